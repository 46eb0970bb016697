"""Edits as facts in closed-form solvers: found, tried, taken out and put back from the record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lit_edit.data.request import EditRequest
from lit_edit.devices.algebra import algebra_device
from lit_edit.editors.base import Proposal, Stopwatch, numbers_of, silent
from lit_edit.editors.closed_form.facts import Facts, join_facts
from lit_edit.editors.closed_form.key_rows import KeyRows
from lit_edit.editors.closed_form.located import LocatedEditor, asked
from lit_edit.editors.closed_form.trial import Group, Trial, absorb, by_block
from lit_edit.editors.closed_form.walk import ResidualMode, Walk, alone, as_columns
from lit_edit.ledger.edit_ledger import Change, LedgerEntry, RecordedFacts
from lit_edit.models.adapter import ModelAdapter
from lit_edit.solvers.recursive_least_squares import RidgeStep
from lit_edit.solvers.shared import Solver

KeyMode = Literal["walked", "base"]


@dataclass(frozen=True)
class _Pending:
    """What the editor takes in once it is written: steps by layer, and the keys to know the new edits by."""

    steps: dict[int, list[RidgeStep]]
    keys: Tensor


class ReversibleEditor(LocatedEditor):
    """An editor whose edits are facts in least-squares solvers.

    Attributes:
        memory: Earlier facts stay in the least-squares problem. On current weights they stay what they were made to be.
        solvers: By layer.
        residual: How the residual is spread over the layers.
        keys: Where keys are read.
    """

    memory: bool = True
    solvers: dict[int, Solver]
    residual: ResidualMode
    keys: KeyMode

    @property
    def exact_undo(self) -> bool:
        """Whether facts depend on no other edit: targets and keys are those of the original model."""
        layers = self.ledger.layers if self.solvers else self.layers or ()
        return self.on_original and self.memory and (self.keys == "base" or len(layers) == 1)

    # ---- one step -----------------------------------------------------------------------------------------------

    def _find(
        self,
        rows: KeyRows,
        names: Sequence[str],
        targets: Tensor,
        shifts: Tensor,
        model: ModelAdapter,
        trial: Trial,
        watch: Stopwatch,
    ) -> Facts:
        """Find keys and residuals of some edits and add them to the trial."""
        walk = Walk(self.ledger, model, self.residual, self.templates, watch, self.measured)
        if self.keys == "walked":

            def adjust(layer: int, keys: Tensor, plain: Tensor, missing: Tensor) -> Tensor:
                return self._residuals(layer, keys, plain, missing, trial.solvers[layer], model)

            def solve(layer: int, keys: Tensor, residuals: Tensor) -> Tensor:
                return self._written(layer, trial.add(layer, keys, residuals))

            return walk.facts(rows.of(names), targets, shifts, solve, adjust)
        single = [slice(i, i + 1) for i in range(len(names))]
        parts = [
            walk.facts(rows.of([name]), targets[:, i], shifts[:, i], alone(self.solvers))
            for name, i in zip(names, single, strict=True)
        ]
        facts = join_facts(parts).columns(range(len(names)))
        with watch("solve"):
            trial.add_blocks(facts)
        return facts

    def _residuals(
        self, layer: int, keys: Tensor, plain: Tensor, missing: Tensor, solver: Solver, model: ModelAdapter
    ) -> Tensor:
        """Return what a layer's solution is to say to some keys, ``(d_out, n)``.

        Args:
            layer: Which.
            keys: ``(d_in, n)``, means over contexts.
            plain: ``(d_in, n)``, those at the plain prompts.
            missing: ``(d_out, n)``, what the layer's weight is to add to its output at the plain prompts.
            solver: The layer's solver, before the step.
            model: What was measured on.
        """
        if self.memory and not self.on_original:  # what the current weights say already is part of the fact
            return missing + solver.delta.to(missing) @ keys
        return missing

    def _model(self, trial: Trial, edited: bool) -> ModelAdapter:
        """Return the model that targets and keys are measured on."""
        if self.on_original:
            return self.ledger.original()
        if not edited:
            return self.ledger.adapter
        return self._view(trial.deltas())

    def _proposal(
        self, trial: Trial, change: Change, facts: Facts | None, entries: tuple[LedgerEntry, ...] = ()
    ) -> Proposal:
        if self._leaves_nothing(change, entries):
            trial.clear()
        updates = self._updates({layer: self._written(layer, delta) for layer, delta in trial.deltas().items()})
        first = self.ledger.layers[0]
        keys = facts.keys[first] if facts is not None else self.solvers[first].delta.new_empty(0, 0)
        return Proposal((), updates, entries, _Pending(trial.steps, keys), change=change)

    def accept(self, proposal: Proposal) -> None:
        """Take the solved facts into the solvers."""
        pending: _Pending = proposal.pending
        absorb(self.solvers, pending.steps)
        self._note(proposal, pending.keys)

    # ---- taking out and putting back ----------------------------------------------------------------------------

    def replay(self, change: Change, entries: Sequence[LedgerEntry], old: Sequence[RecordedFacts]) -> Proposal:
        """Do again what is on record; see :meth:`Editor.replay`."""
        trial, groups = Trial(self.solvers), self._read(old)
        if change.restored:
            trial.restore(groups)
            facts: Facts | None = join_facts([group.meant for group in groups])
        else:
            trial.remove(groups)
            facts = None
        if change.tensors:
            facts = Facts.from_tensors(change.tensors, algebra_device(self.ledger.adapter.device))
            trial.add_blocks(facts)
        return self._proposal(trial, change, facts, tuple(entries))

    def retract(self, facts: Sequence[RecordedFacts], reason: str = "", exact: bool = False) -> Proposal:
        """Work out the updates without some edits; see :meth:`Editor.retract`."""
        numbers = tuple(sorted(numbers_of(facts)))
        later = self._touched(numbers) if exact and not self.exact_undo else []
        trial = Trial(self.solvers)
        trial.remove(self._read(self.ledger.facts_of([*numbers, *later])))
        if not later:
            return self._proposal(trial, Change("undo", removed=numbers, reason=reason), None)
        blocks = by_block(self.ledger.facts_of(later))
        joined = join_facts([self._make_again(block, trial) for block in blocks])
        order = tuple(number for block in blocks for number in block.numbers)
        change = Change("undo", removed=numbers, rewritten=order, tensors=joined.as_tensors(), reason=reason)
        return self._proposal(trial, change, joined)

    def _touched(self, numbers: Sequence[int]) -> list[int]:
        """Return the edits that hold and bear some others in them: the later ones, and those of the same blocks."""
        undone = self.ledger.history.undone
        near = {n for number in numbers for n in self.ledger.history.beside(number) if n not in undone}
        blocks = by_block(self.ledger.facts_of(sorted(near)))
        mates = {n for block in blocks if set(block.numbers) & set(numbers) for n in block.numbers}
        held = [entry.number for entry in self.ledger.entries if entry.number not in numbers]
        return [number for number in held if number > min(numbers) or number in mates]

    def _make_again(self, block: RecordedFacts, trial: Trial) -> Facts:
        """Find keys and residuals of some edits anew, on what a trial has come to, and add them to it."""
        requests = [EditRequest.from_dict(self.ledger.history.entry(n).request) for n in block.numbers]
        model = self._model(trial, edited=True)
        before = Group.of(block, self.ledger.adapter.device).meant
        targets, shifts = before.targets, before.shifts
        if not self.on_original:
            fitted = self._optimise(requests, model, silent)
            targets, shifts = as_columns([t.value for t in fitted]), as_columns([t.delta for t in fitted])
        with self.ledger.adapter.fast_products():
            rows = self._make_key_rows(requests)
            return self._find(rows, [asked(r) for r in requests], targets, shifts, model, trial, Stopwatch())

    def reinstate(self, facts: Sequence[RecordedFacts]) -> Proposal:
        """Work out the updates with some edits put back; see :meth:`Editor.reinstate`."""
        return super().reinstate(by_block(facts))

    def deviation(self, proposal: Proposal, sample: int = 4) -> float:
        """Estimate how far a retraction is from a stream without the edits; see :meth:`Editor.deviation`.

        Keys and residuals of some later edits, those next in line and those with the nearest keys, are found anew
        without the retracted ones: by how much they move, relative to their lengths, at most.
        """
        removed = proposal.change.removed
        later = [] if self.exact_undo else self._touched(removed)
        if not later or self.known is None:
            return 0.0
        first = self.ledger.layers[0]
        near: list[int] = []
        for group in self._read(self.ledger.facts_of(removed)):
            keys = group.meant.keys[first]
            near += [n for c in range(keys.shape[1]) for n, _ in self.known.nearest(keys[:, c], 64) if n in later]
        chosen = dict.fromkeys([*near[:sample], *later[:sample]])
        moved = 0.0
        for block in by_block(self.ledger.facts_of(list(chosen))):
            found = []
            for out in ((), removed):
                trial = Trial(self.solvers)
                trial.remove(self._read(self.ledger.facts_of([*out, *block.numbers])))
                found.append(self._make_again(block, trial))
            moved = max(moved, _distance(*found))
        return moved

    def _read(self, recorded: Sequence[RecordedFacts]) -> list[Group]:
        return [Group.of(block, self.ledger.adapter.device) for block in by_block(recorded)]


def _distance(one: Facts, other: Facts) -> float:
    """Return by how much keys or residuals differ, relative to their lengths, at most."""
    pairs = [(a[n], b[n]) for a, b in ((one.keys, other.keys), (one.residuals, other.residuals)) for n in a]
    return max(float(((b - a).norm(dim=0) / a.norm(dim=0).clamp(min=1e-300)).max()) for a, b in pairs)
