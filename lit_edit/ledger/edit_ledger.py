"""The ledger: the only object that writes weights.

It keeps the original values of the touched weights and every committed edit. A commit writes all layers or none, and
only finite values; a weight is always ``cast(W0 + delta)``, so low-precision models lose nothing by accumulation. What
is written stands in the journal first: a process may die at any instant, and the next one knows all that counted.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, Literal

import torch
from torch import Tensor

from lit_edit.devices.algebra import algebra_device
from lit_edit.files.checksum import checksum
from lit_edit.ledger.history import EditHistory, LedgerEntry
from lit_edit.ledger.journal import Journal, JournalError, Record
from lit_edit.ledger.ownership import claim
from lit_edit.ledger.written import LayerUpdate, WrittenWeights
from lit_edit.models.adapter import ModelAdapter

__all__ = [
    "Change",
    "EditLedger",
    "EditRefusedError",
    "LayerUpdate",
    "LedgerEntry",
    "Origin",
    "RecordedFacts",
    "weights_state",
]

Origin = Literal["stream", "guard", "user"]

log = logging.getLogger(__name__)


class EditRefusedError(ValueError):
    """A commit that would have written something it must not; the weights are as they were."""


@dataclass(frozen=True)
class Change:
    """What a commit does beside making its entries, and what is kept so that it can be done again or taken back.

    Attributes:
        kind: Whether edits are made, taken out, or put back.
        removed: Numbers of edits that hold no longer.
        restored: Numbers of edits that hold again.
        rewritten: Numbers of edits that were solved anew; their facts are in :attr:`tensors`.
        tensors: Facts, one column per entry and then per rewritten edit, in whatever form the editor wants them back.
        origin: Who wants it: the stream itself, a guard, or the user.
        reason: Why edits are taken out, for people.
    """

    kind: Literal["edit", "undo", "redo"] = "edit"
    removed: tuple[int, ...] = ()
    restored: tuple[int, ...] = ()
    rewritten: tuple[int, ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    origin: Origin = "stream"
    reason: str = ""


@dataclass(frozen=True)
class RecordedFacts:
    """Facts of some edits, as one record of the journal holds them.

    Attributes:
        numbers: The edits asked for.
        columns: Where in the tensors they are.
        rest: Columns of the same record whose edits hold and are not asked for.
        tensors: What the editor put on record.
    """

    numbers: tuple[int, ...]
    columns: tuple[int, ...]
    rest: tuple[int, ...]
    tensors: Mapping[str, Tensor]


class EditLedger(WrittenWeights):
    """Original weights, committed edits, and the one way to write them.

    Args:
        adapter: The model, unedited at this moment.
        layers: The layers that may be written.
        journal: Where commits are recorded; in memory when not given.
        adopt: Take the weights for the original ones whatever they are.

    Raises:
        WeightsChangedError: If the model holds edits that this ledger would know nothing of.

    Attributes:
        history: Which edits were made and which of them hold.
        position: How many records of the journal have been done to this model. Less than there are while a run that
            died is taken up: the rest is :attr:`ahead`, and a commit then repeats a record instead of adding one.
    """

    def __init__(
        self, adapter: ModelAdapter, layers: Sequence[int], journal: Journal | None = None, adopt: bool = False
    ) -> None:
        super().__init__(adapter, layers)
        claim(adapter.model, self, adopt)
        self.journal = Journal() if journal is None else journal
        self.history = EditHistory()
        self.position = 0
        self.ahead: deque[int] = deque(range(len(self.journal)))
        self._rounding_told = False

    def __len__(self) -> int:
        return len(self.history.live)

    @property
    def entries(self) -> list[LedgerEntry]:
        """The edits that hold, in the order of making."""
        return self.history.live

    @property
    def made(self) -> int:
        """How many edits were made, whether they hold still or not; it never falls."""
        return len(self.history.made)

    @torch.no_grad()
    def commit(
        self, updates: Sequence[LayerUpdate], entries: Sequence[LedgerEntry], change: Change = Change()
    ) -> tuple[LedgerEntry, ...]:
        """Record and write the updates of all layers, or do nothing.

        Args:
            updates: At most one per layer.
            entries: The edits that these updates make.
            change: What else they do, and what is to be kept of them.

        Returns:
            The entries with their numbers.

        Raises:
            EditRefusedError: If a layer is not in this ledger, occurs twice, has another shape, or would hold a value
                that is not finite.
            JournalError: If the change does not fit what holds, or is not what the journal says was done here.
            OSError: If the journal cannot be written; nothing has changed then.
            WeightsChangedError: If somebody else has written the model's weights.
        """
        self.verify()
        new = self.check(updates, entries)
        numbered = self.history.number(entries)
        record: Record = {
            "kind": change.kind,
            "entries": [entry.as_record() for entry in numbered],
            "removed": list(change.removed),
            "restored": list(change.restored),
            "rewritten": list(change.rewritten),
            "origin": change.origin,
            "reason": change.reason,
            "facts": bool(change.tensors),
            "weights": {name: checksum(weight) for name, weight in new.items()},
        }
        self._record(record, change.tensors)
        for update in updates:  # nothing below can fail
            # The leader's bits for all ranks: another processor may have rounded otherwise.
            self._write(update, self.adapter.ranks.same(new[update.name]))
        torch.clear_autocast_cache()  # may hold copies of the old weights
        return numbered

    def note(self, record: Mapping[str, Any]) -> None:
        """Record something that writes no weights: the beginning of a stream, edits that were refused, its end."""
        self._record({**record, "facts": False}, {})

    def _record(self, record: Record, tensors: Mapping[str, Tensor]) -> None:
        """Put a record into the journal, or find it there when a run that died is taken up."""
        self.history.check(record)
        if self.ahead:
            self._compare(record, self.journal.record(self.ahead[0]))
            index = self.ahead.popleft()
        else:
            stamped = {**record, "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds")}
            index = self.journal.append(stamped, tensors)
        self.history.apply(record, index)
        self.position = index + 1

    def _compare(self, record: Record, known: Record) -> None:
        if _essence(record) != _essence(known):
            raise JournalError(
                f"the journal's record {self.position + 1} is {_title(known)}, this run does {_title(record)}: resume "
                "with the data and the settings that the run was made with"
            )
        if known.get("weights") != record.get("weights") and not self._rounding_told:
            self._rounding_told = True
            log.warning(
                "the weights after %s differ from those recorded, by rounding: another machine, library or number of "
                "threads. The run goes on, but not bit for bit",
                _title(record),
            )

    def next_record(self) -> Record | None:
        """Return the record that the next commit is to repeat, or ``None`` if everything recorded has been done."""
        return self.journal.record(self.ahead[0]) if self.ahead else None

    def next_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of :meth:`next_record`."""
        return self.journal.tensors(self.ahead[0])

    def take_up(self, journal: Journal) -> None:
        """Go on in a journal: what it holds beyond this ledger's position is ahead. An empty one takes over.

        Raises:
            JournalError: If it is not the journal that this ledger's edits were recorded in.
        """
        if not len(journal):
            self.journal.copy_to(journal)
        if len(journal) < self.position or journal.digest(self.position) != self.journal.digest(self.position):
            raise JournalError(
                f"{journal.path or 'the journal'} does not belong to these edits: it holds {len(journal)} records, and "
                f"the first {self.position} are not those of the checkpoint"
            )
        self.journal = journal
        self.ahead = deque(range(self.position, len(journal)))

    def facts_of(self, numbers: Sequence[int]) -> list[RecordedFacts]:
        """Return what is on record about some edits, a record at a time, oldest first.

        Raises:
            JournalError: If there is no such edit or its facts are not recorded.
        """
        wanted: dict[int, list[tuple[int, int]]] = {}
        for number in sorted(set(numbers)):
            record, column = self.history.place(number)
            wanted.setdefault(record, []).append((number, column))
        found = []
        for record, pairs in wanted.items():
            asked = {number for number, _ in pairs}
            rest = [n for n in self.history.beside(pairs[0][0]) if n not in asked and n not in self.history.undone]
            found.append(
                RecordedFacts(
                    tuple(number for number, _ in pairs),
                    tuple(column for _, column in pairs),
                    tuple(self.history.place(number)[1] for number in rest),
                    self.journal.tensors(record),
                )
            )
        return found

    @torch.no_grad()
    def check(self, updates: Sequence[LayerUpdate], entries: Sequence[LedgerEntry]) -> dict[str, Tensor]:
        """Return the weights that the updates would write; raise ``EditRefusedError`` if one of them must not be."""
        new: dict[str, Tensor] = {}
        for update in updates:
            if update.layer not in self.names or update.name != self.names[update.layer]:
                raise EditRefusedError(f"{update.name} (layer {update.layer}) is not among the edited weights")
            if update.name in new:
                raise EditRefusedError(f"{update.name} is updated twice in one commit")
            if tuple(update.delta.shape) != self.adapter.shape(update.layer):
                raise EditRefusedError(
                    f"the update of {update.name} must be (d_out, d_in) = {self.adapter.shape(update.layer)}, "
                    f"got {tuple(update.delta.shape)}"
                )
            weight = self.edited_weight(update.layer, update.delta)
            if not torch.isfinite(weight).all():
                edits = ", ".join(repr(entry.id) for entry in entries)
                raise EditRefusedError(f"edit {edits} would write NaN or infinite values into {update.name}; refused")
            new[update.name] = weight
        return new

    @torch.no_grad()
    def restore_base(self) -> None:
        """Put the original weights back and forget all edits; what was recorded in memory is forgotten as well.

        Raises:
            WeightsChangedError: If somebody else has written the model's weights: that would be lost.
        """
        self.verify()
        self._write_base()
        self.adapter.memory = None
        self.history, self.position = EditHistory(), 0
        if self.journal.path is None:
            self.journal = Journal()
        self.ahead = deque(range(len(self.journal)))

    def state_dict(self) -> dict[str, Any]:
        """Return updates and history as tensors and primitives; the tensors are the ledger's own.

        A journal in memory is part of it, one on disk is referred to.
        """
        state: dict[str, Any] = {
            "deltas": dict(self.deltas),
            "history": self.history.state_dict(),
            "position": self.position,
            "digest": self.journal.digest(self.position),
        }
        if self.journal.path is None and not isinstance(self.journal, _Remembered):
            state["journal"] = self.journal.as_bytes()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Write the saved updates and restore the history, or change nothing.

        Raises:
            EditRefusedError: If the saved updates do not fit this model or these layers.
            JournalError: If the saved journal is damaged.
        """
        by_name = {name: layer for layer, name in self.names.items()}
        unknown = sorted(set(state["deltas"]) - set(by_name))
        if unknown:
            raise EditRefusedError(
                f"the checkpoint edits {', '.join(unknown)}, this stream edits layers {list(self.layers)}; "
                "use the config that the checkpoint was made with"
            )
        history = EditHistory.from_state(state["history"])
        updates = [
            LayerUpdate(by_name[name], name, delta.to(algebra_device(self.base[name].device)))
            for name, delta in state["deltas"].items()
        ]
        new = self.check(updates, history.live)
        if "journal" in state:
            journal = Journal.from_bytes(state["journal"])
            ahead = range(state["position"], len(journal))
        else:
            journal, ahead = _Remembered(state["position"], state["digest"]), range(0)
        self.restore_base()
        for update in updates:
            self._write(update, new[update.name])
        self.history, self.position, self.journal, self.ahead = history, state["position"], journal, deque(ahead)


class _Remembered(Journal):
    """Stands for a journal that is elsewhere: all that is known of it is its digest at one place."""

    def __init__(self, count: int, digest: str) -> None:
        super().__init__()
        self._count, self._digest = count, digest

    def digest(self, count: int | None = None) -> str:
        return self._digest

    def append(self, record: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> int:
        raise JournalError(_MISSING)

    def copy_to(self, other: Journal, count: int | None = None) -> None:
        raise JournalError(_MISSING)


_MISSING = (
    "the journal of these edits is missing: keep the folder 'ledger' of the run beside the folder of its checkpoints"
)


def weights_state(journal: Journal) -> str:
    """Return digits for the state of the weights that a journal leads to; records that write none do not change it."""
    changing = [i for i, record in enumerate(journal.records) if record["kind"] in ("edit", "undo", "redo")]
    return journal.digest(changing[-1] + 1 if changing else 0)


def _essence(record: Record) -> Any:
    """What two runs of the same stream must agree on."""
    asked = [tuple(LedgerEntry.from_record(entry).asked) for entry in record.get("entries", ())]
    lists = [list(record.get(name, ())) for name in ("removed", "restored", "rewritten", "ids")]
    return record["kind"], asked, lists


def _title(record: Record) -> str:
    """Name a record for people."""
    if names := [entry["id"] for entry in record.get("entries", ())] or record.get("ids"):
        return f"{record['kind']} {', '.join(map(repr, names))}"
    numbers = [*record.get("removed", ()), *record.get("restored", ())]
    return f"{record['kind']} {', '.join(map(str, numbers))}".strip()
