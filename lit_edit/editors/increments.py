"""Editors whose update is a sum: each step adds an increment to the down projections of a few layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_edit.devices.algebra import algebra_device, for_algebra
from lit_edit.editors.base import Deltas, Editor, Moments, Proposal, Status
from lit_edit.editors.transforms.base import UpdateTransform, transformed
from lit_edit.errors import ArgumentError
from lit_edit.ledger.edit_ledger import Change, LedgerEntry, RecordedFacts
from lit_edit.models.adapter import ModelAdapter


class IncrementEditor(Editor):
    """What editors have in common whose state is the sum of the increments of all steps that hold.

    An edit is taken out by subtracting what its step has added, though later steps began where it had ended.

    Args:
        transforms: Applied to what is written. The next step goes on from what is written.
    """

    separable: ClassVar[bool] = False
    """Whether what each edit of a step has added can be told apart; :meth:`share` then does."""

    def __init__(self, transforms: Sequence[UpdateTransform] = ()) -> None:
        self.transforms = tuple(transforms)
        self.sums: Deltas = {}

    # ---- what a method says ------------------------------------------------------------------------------------------

    @abstractmethod
    def increments(self, record: Mapping[str, Tensor]) -> Deltas:
        """Return what a step has added to the updates, from its record."""

    def share(self, recorded: RecordedFacts) -> Deltas:
        """Return what some edits have added to the updates: all those of a step, unless they can be told apart."""
        return self.increments({name: self._here(tensor) for name, tensor in recorded.tensors.items()})

    def remember(self, record: Mapping[str, Tensor]) -> None:
        """Take in what the next step needs of the record of this one; an empty one: as in the beginning."""

    def bounded(self, delta: Tensor) -> Tensor:
        """Return the update nearest to one ``(d_out, d_in)`` that the method allows."""
        return delta

    # ---- before the stream -------------------------------------------------------------------------------------------

    def _begin(self, moments: Moments, status: Status) -> None:
        self.check_whole(self.ledger.adapter)
        self.sums = {}
        self.remember({})

    def settings(self) -> dict[str, Any]:
        """Return all settings that a result depends on."""
        return {
            **super().settings(),
            "layers": list(self.ledger.layers),
            "transforms": [transform.settings() for transform in self.transforms],
        }

    # ---- what is written ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _written(self, sums: Deltas) -> Deltas:
        """Return what is written for sums of increments: bounded, and transformed."""
        updates = {}
        for layer in self.ledger.layers:
            adapter, base = self.ledger.adapter, self.ledger.base[self.ledger.names[layer]]
            if layer in sums:
                delta = self.bounded(sums[layer])
                if self.transforms:
                    own = for_algebra(adapter.to_layout(layer, base))  # a transpose is its own inverse
                    delta = transformed(delta, own, self.transforms)
            else:
                delta = for_algebra(base.new_zeros(adapter.shape(layer)))
            updates[layer] = delta
        return updates

    def _model(self, sums: Deltas) -> ModelAdapter:
        """Return the model with other sums than its own."""
        return self.ledger.preview(self._updates(self._written(sums)))

    def _proposal(
        self,
        sums: Deltas,
        change: Change,
        entries: tuple[LedgerEntry, ...] = (),
        record: Mapping[str, Tensor] | None = None,
    ) -> Proposal:
        if self._leaves_nothing(change, entries):
            sums, record = {}, {}  # as in the beginning, to the last bit
        updates = self._updates(self._written(sums))
        return Proposal((), updates, entries, (sums, record), change=change)

    def accept(self, proposal: Proposal) -> None:
        """Take in the sums that are now written."""
        self.sums, record = proposal.pending
        if record is not None:
            self.remember(record)

    # ---- taking out, putting back, doing again -----------------------------------------------------------------------

    def replay(self, change: Change, entries: Sequence[LedgerEntry], old: Sequence[RecordedFacts]) -> Proposal | None:
        """Do again what is on record; see :meth:`Editor.replay`."""
        if entries and not change.tensors:
            return None
        sums = self._added(self.sums, old, 1 if change.restored else -1)
        if not entries:
            return self._proposal(sums, change)
        record = {name: self._here(tensor) for name, tensor in change.tensors.items()}
        return self._proposal(plus(sums, self.increments(record), 1), change, tuple(entries), record)

    def retract(self, facts: Sequence[RecordedFacts], reason: str = "", exact: bool = False) -> Proposal:
        """Subtract what some steps have added; refuse edits that cannot be told from others of their step."""
        if not exact:
            self._check_together(facts, "taken out")
        return super().retract(facts, reason, exact)

    def reinstate(self, facts: Sequence[RecordedFacts]) -> Proposal:
        """Add what some steps had added; as :meth:`retract`."""
        self._check_together(facts, "put back")
        return super().reinstate(facts)

    def _check_together(self, facts: Sequence[RecordedFacts], done: str) -> None:
        if broken := self._broken(facts):
            raise ArgumentError(
                f"these edits cannot be {done} alone: one was made {broken}, and what each has changed cannot be told "
                f"apart. Name all edits of the step"
            )

    def _broken(self, facts: Sequence[RecordedFacts]) -> str:
        """Say which edits of a step are missing among some, where they cannot be told apart; or nothing."""
        for recorded in () if self.separable else facts:
            missing = sorted(set(self.ledger.history.beside(recorded.numbers[0])) - set(recorded.numbers))
            if missing:
                return f"in one step with edit {', '.join(map(str, missing))}"
        return ""

    def _added(self, sums: Deltas, facts: Iterable[RecordedFacts], sign: int) -> Deltas:
        """Return the sums with the increments of some steps added or subtracted."""
        for recorded in facts:
            sums = plus(sums, self.share(recorded), sign)
        return sums

    def _here(self, tensor: Tensor) -> Tensor:
        """Bring a recorded tensor to where the algebra is done."""
        return tensor.to(algebra_device(self.ledger.adapter.device))

    # ---- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of the increments."""
        return {**super().state_dict(), "sums": {str(layer): delta for layer, delta in self.sums.items()}}

    def check_state(self, state: Mapping[str, Any], layers: Sequence[int]) -> None:
        """Raise :class:`ArgumentError` if a saved state is of other layers or another method."""
        super().check_state(state, layers)
        saved = sorted(map(int, state["sums"]))
        if saved and saved != sorted(layers):
            raise ArgumentError(
                f"the checkpoint edits layers {saved}, this editor {sorted(layers)}; use the config that the "
                "checkpoint was made with"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the sums on a prepared editor."""
        self.check_state(state, self.ledger.layers)
        self.sums = {int(layer): self._here(delta).clone() for layer, delta in state["sums"].items()}


def plus(sums: Deltas, increments: Deltas, sign: int) -> Deltas:
    """Return sums with increments added (``sign`` 1) or subtracted (-1)."""
    if not sums:
        return {layer: sign * increment for layer, increment in increments.items()}
    return {layer: sums[layer].to(increment.device) + sign * increment for layer, increment in increments.items()}


class FactoredEditor(IncrementEditor):
    """What editors have in common that make an edit of gradients: its increment is a function of factors of its tokens.

    On record are, by layer, the ``inputs`` ``(tokens, d_in)`` and ``values`` ``(tokens, d_out)`` of all tokens of a
    step, and whose each token is (``owner``).
    """

    separable = True

    @abstractmethod
    def product(self, inputs: Tensor, values: Tensor) -> Tensor:
        """Return the increment ``(d_out, d_in)`` that some tokens make."""

    def increments(self, record: Mapping[str, Tensor]) -> Deltas:
        """Return what a step has added to the updates, from its record."""
        return self._increments(record)

    def share(self, recorded: RecordedFacts) -> Deltas:
        """Return what some edits of a step have added."""
        return self._increments(recorded.tensors, recorded.columns)

    def _increments(self, record: Mapping[str, Tensor], edits: Sequence[int] | None = None) -> Deltas:
        """Return what a step, or some of its edits alone, would have added."""
        owner = record["owner"]
        wanted = owner if edits is None else torch.tensor(list(edits), dtype=torch.long).to(owner)
        chosen = torch.isin(owner, wanted).nonzero()[:, 0]
        increments = {}
        for layer in self.ledger.layers:
            inputs, values = (for_algebra(self._here(record[f"{part}.{layer}"])) for part in ("inputs", "values"))
            own = chosen.to(inputs.device)
            increments[layer] = self.product(inputs[own], values[own])
        return increments
