"""The engine of the editors that keep their edits beside the weights: they write no layer.

What an edit leaves is on record; the memory (:mod:`lit_edit.models.memory`) is made of what is on record of the edits
that hold, in their order. So a journal is taken up without learning anything anew, and a checkpoint holds all that the
memory is made of. An edit that is taken out leaves no trace, unless a later one was learnt on top of it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lit_edit.data.request import EditRequest
from lit_edit.editors.base import Editor, Moments, Proposal, Status, Step, entry_of, numbers_of
from lit_edit.ledger.edit_ledger import Change, LedgerEntry, RecordedFacts
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.memory import Memory


@dataclass(frozen=True)
class Learnt:
    """What an edit leaves: tensors, of the same shapes for every edit of a step, and numbers for the ledger."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, float]


@dataclass(frozen=True)
class Kept:
    """An edit that holds: what the ledger says of it, and what it has left."""

    entry: LedgerEntry
    tensors: Mapping[str, Tensor]


class MemoryEditor(Editor):
    """Keep edits in a memory that the model computes with. Several processes each do all of the work, with one result.

    Attributes:
        kept: The edits that hold, by number, in order.
    """

    kept: dict[int, Kept]

    # ---- what a method says ------------------------------------------------------------------------------------------

    def set_up(self, status: Status) -> None:
        """Load what is needed once, beside the model and the tokenizer (``self.ledger``, ``self.tokenizer``)."""

    @abstractmethod
    def learn(self, requests: Sequence[EditRequest], kept: Sequence[Kept], status: Status) -> list[Learnt]:
        """Return what each of some edits leaves; nothing is changed.

        Where that depends on the edits that hold, taking one out is not exact: override :attr:`exact_undo`.

        Args:
            requests: The edits of a step; the first has the number ``self.ledger.made + 1``.
            kept: The edits that hold, in order, without those that are replaced in the step.
            status: Receives a line about what is going on.

        Raises:
            FloatingPointError: If one cannot be learnt.
        """

    @abstractmethod
    def memory_of(self, kept: Sequence[Kept]) -> Memory:
        """Return what some edits, in order, make of the model; must not fail."""

    # ---- the stream --------------------------------------------------------------------------------------------------

    @property
    def exact_undo(self) -> bool:
        """Whether an edit that is taken out leaves what a stream without it would have made."""
        return True

    def resolve_layers(self, adapter: ModelAdapter) -> tuple[int, ...]:
        """Return no layers: none is written."""
        return ()

    def _begin(self, moments: Moments, status: Status) -> None:
        """Put the memory, empty, beside the ledger's model; no statistics are needed."""
        self.check_whole(self.ledger.adapter)
        self.set_up(status)
        self._hold({})

    def _work_out(self, step: Step) -> Proposal:
        requests, gone = step.requests, tuple(sorted(numbers_of(step.replaced)))
        with step.watch("targets"):
            learnt = self.learn(requests, [kept for n, kept in self.kept.items() if n not in gone], step.status)
        same = self.ledger.adapter.ranks.same
        stacked = {name: torch.stack([one.tensors[name] for one in learnt], -1) for name in learnt[0].tensors}
        tensors = {name: same(tensor).cpu() for name, tensor in stacked.items()}
        entries = tuple(entry_of(request, one.facts) for request, one in zip(requests, learnt, strict=True))
        change = Change(removed=gone, tensors=tensors)
        return Proposal((), (), entries, _columns(tensors, len(entries)), change=change)

    def accept(self, proposal: Proposal) -> None:
        """Take edits in or out, and make the memory of those that hold."""
        self._hold(self._kept_after(proposal))

    def memory_after(self, proposal: Proposal) -> Memory:
        """Return the memory as a proposal would make it."""
        return self.memory_of(list(self._kept_after(proposal).values()))

    def _kept_after(self, proposal: Proposal) -> dict[int, Kept]:
        entries = proposal.entries or [self.ledger.history.entry(number) for number in proposal.change.restored]
        added: list[dict[str, Tensor]] = proposal.pending
        fresh = self.ledger.made + 1  # of entries that have no number yet: they are not committed
        numbers = [entry.number or fresh + i for i, entry in enumerate(entries)]
        new = {
            number: Kept(replace(entry, number=number), tensors)
            for number, entry, tensors in zip(numbers, entries, added, strict=True)
        }
        gone = set(proposal.change.removed)
        return dict(sorted((n, kept) for n, kept in {**self.kept, **new}.items() if n not in gone))

    def _hold(self, kept: dict[int, Kept]) -> None:
        self.kept = kept
        self.ledger.adapter.memory = self.memory_of(list(kept.values()))

    def replay(self, change: Change, entries: Sequence[LedgerEntry], old: Sequence[RecordedFacts]) -> Proposal | None:
        """Do again what is on record; see :meth:`Editor.replay`."""
        if entries:
            return Proposal((), (), tuple(entries), _columns(change.tensors, len(entries)), {}, change)
        by_number = _by_number(old)
        return Proposal((), (), (), [by_number[number] for number in change.restored], {}, change)

    # ---- state -------------------------------------------------------------------------------------------------------

    def recall(self) -> None:
        """Make the memory of the edits that hold in the ledger, from its journal."""
        live = [entry.number for entry in self.ledger.entries]
        found = _by_number(self.ledger.facts_of(live))
        self._hold({number: Kept(self.ledger.history.entry(number), found[number]) for number in live})

    def state_dict(self) -> dict[str, Any]:
        """Return what each edit that holds has left."""
        return {**super().state_dict(), "kept": {str(number): dict(kept.tensors) for number, kept in self.kept.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the memory on a prepared editor whose ledger has its history already."""
        self.check_state(state, self.ledger.layers)
        entry = self.ledger.history.entry
        numbers = sorted(map(int, state["kept"]))
        self._hold({number: Kept(entry(number), state["kept"][str(number)]) for number in numbers})


def _columns(tensors: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Take what some edits have left, a column each, apart."""
    return [{name: tensor[..., column].clone() for name, tensor in tensors.items()} for column in range(count)]


def _by_number(facts: Sequence[RecordedFacts]) -> dict[int, dict[str, Tensor]]:
    return {
        number: {name: tensor[..., column].clone() for name, tensor in recorded.tensors.items()}
        for recorded in facts
        for number, column in zip(recorded.numbers, recorded.columns, strict=True)
    }
