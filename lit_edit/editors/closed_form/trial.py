"""Trying steps on solvers without changing them: facts are added, taken out and put back, and the steps remembered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_edit.devices.algebra import algebra_device
from lit_edit.editors.closed_form.facts import Facts, join_facts
from lit_edit.ledger.edit_ledger import RecordedFacts
from lit_edit.solvers.recursive_least_squares import Block, RidgeStep
from lit_edit.solvers.shared import Solver


@dataclass(frozen=True)
class Group:
    """Facts of one block: those that are meant, and those beside them that hold."""

    meant: Facts
    beside: Facts

    @classmethod
    def of(cls, block: RecordedFacts, device: torch.device) -> Group:
        """Read a block, one of :func:`by_block`, for a model on some device."""
        facts, place = Facts.from_tensors(block.tensors, torch.device("cpu")), algebra_device(device)
        return cls(facts.columns(block.columns).to(place), facts.columns(block.rest).to(place))


def by_block(recorded: Sequence[RecordedFacts]) -> list[RecordedFacts]:
    """Return recorded facts by the blocks that they were solved in, in the order of making.

    A record holds one block, but for those of edits that were made again: these stand in one record together.
    """
    blocks = []
    for record in recorded:
        owner = [block for block, size in enumerate(record.tensors["blocks"].tolist()) for _ in range(size)]
        for block in dict.fromkeys(owner[column] for column in record.columns):
            pairs = [(n, c) for n, c in zip(record.numbers, record.columns, strict=True) if owner[c] == block]
            numbers, columns = zip(*pairs, strict=True)
            rest = tuple(column for column in record.rest if owner[column] == block)
            blocks.append(RecordedFacts(numbers, columns, rest, record.tensors))
    return sorted(blocks, key=lambda block: block.numbers[0])


class Trial:
    """Solvers of all edited layers, forked to try a transaction on; absorbing ``steps`` brings the real ones there."""

    def __init__(self, solvers: Mapping[int, Solver]) -> None:
        self.solvers = {layer: solver.fork() for layer, solver in solvers.items()}
        self.steps: dict[int, list[RidgeStep]] = {layer: [] for layer in solvers}

    def deltas(self) -> dict[int, Tensor]:
        """Return the solution of each layer, ``(d_out, d_in)``."""
        return {layer: solver.delta for layer, solver in self.solvers.items()}

    def add(self, layer: int, keys: Tensor, residuals: Tensor) -> Tensor:
        """Add a block of facts to one layer; return its solution."""
        return self._take(layer, self.solvers[layer].preview(keys, residuals))

    def take_out(self, layer: int, keys: Tensor, residuals: Tensor) -> Tensor:
        """Take facts out of one layer, of a solver with memory; return its solution."""
        return self._take(layer, self.solvers[layer].preview_removal(keys, residuals))

    def add_blocks(self, facts: Facts) -> None:
        """Add facts to all layers, block by block as they were solved."""
        first = 0
        for size in facts.blocks:
            columns = slice(first, first + size)
            for layer in self.solvers:
                self.add(layer, facts.keys[layer][:, columns], facts.residuals[layer][:, columns])
            first += size

    def remove(self, groups: Sequence[Group]) -> None:
        """Take facts out."""
        self._exchange([group for group in groups if len(group.meant)], out=True)

    def restore(self, groups: Sequence[Group]) -> None:
        """Put facts back."""
        self._exchange([group for group in groups if len(group.meant)], out=False)

    def clear(self) -> None:
        """Make all solutions zero: no edit holds any more, and what taking them out has left is rounding."""
        for layer, solver in self.solvers.items():
            self._take(layer, solver.clearing())

    def _exchange(self, groups: Sequence[Group], out: bool) -> None:
        if not groups:
            return
        meant = join_facts([group.meant for group in groups])
        for layer, solver in self.solvers.items():
            if not solver.memory:  # a block was solved by itself: it is solved again with other columns
                whole = [_block(join_facts([group.beside, group.meant]), layer) for group in groups]
                rest = [_block(group.beside, layer) for group in groups]
                step = solver.preview_exchange(whole, rest) if out else solver.preview_exchange(rest, whole)
            elif out:
                step = solver.preview_removal(meant.keys[layer], meant.residuals[layer])
            else:
                step = solver.preview(meant.keys[layer], meant.residuals[layer])
            self._take(layer, step)

    def _take(self, layer: int, step: RidgeStep) -> Tensor:
        self.solvers[layer].absorb(step)
        self.steps[layer].append(step)
        return step.delta


def absorb(solvers: Mapping[int, Solver], steps: Mapping[int, Sequence[RidgeStep]]) -> None:
    """Bring solvers, by layer, to where the steps of a trial have led."""
    for layer, done in steps.items():
        for step in done:
            solvers[layer].absorb(step)


def _block(facts: Facts, layer: int) -> Block:
    return Block(facts.keys[layer], facts.residuals[layer])
