"""The search: single layers on a grid that gets finer, groups around the best, and the held-out comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lit_edit.errors import ArgumentError, counted
from lit_edit.studies.layers.candidates import (
    Layers,
    coarse_layers,
    groups_around,
    rounds_of,
    shown,
    with_neighbours,
)
from lit_edit.studies.layers.trial import Stage, Trial

Measure = Callable[[Stage, Layers, int], Trial]
"""Tries a candidate with so many edits, or says what is on record of it."""

Tell = Callable[[str, int, int], None]
"""Receives what is tried next, which of the round's candidates it is (from 0), and how many these are."""


@dataclass(frozen=True)
class Plan:
    """What is searched."""

    depth: int  # layers of the model
    stride: int  # of the first grid
    widths: tuple[int, ...]  # of groups, ascending
    edits: int  # to choose by
    held_out: int  # edits to compare on
    default: Layers  # that the method takes by itself


@dataclass(frozen=True)
class Found:
    """What the search has found."""

    best: Trial  # on the edits it was chosen by
    best_held_out: Trial  # the same layers on the held-out edits
    default_held_out: Trial  # the default layers on them

    @property
    def proposed(self) -> Trial:
        """The better of the two on the held-out edits; the default where neither is."""
        if self.best_held_out.rank > self.default_held_out.rank:
            return self.best_held_out
        return self.default_held_out


def search_layers(plan: Plan, measure: Measure, tell: Tell = lambda what, number, of: None) -> Found:
    """Search layers for a method on a model.

    Successive halving (arXiv 1502.07943): every candidate is first tried on few edits, the best on more, and only
    trials over the same edits are compared. A method that works nowhere is refused.
    """

    def try_all(stage: Stage, what: str, candidates: Sequence[Layers], edits: int) -> list[Trial]:
        trials = []
        for number, layers in enumerate(candidates):
            tell(f"{what}: {shown(layers)}, {counted(edits, 'edit')}", number, len(candidates))
            trials.append(measure(stage, layers, edits))
        return sorted(trials, key=lambda trial: trial.rank, reverse=True)

    candidates = coarse_layers(plan.depth, plan.stride)
    best: list[Trial] = []
    rounds = rounds_of(plan.stride, plan.edits)
    for number, turn in enumerate(rounds, 1):
        if best:
            go_on = [trial.layers for trial in best[: max(2, len(best) // 4)]]
            candidates = with_neighbours(go_on, turn.step, plan.depth)
        best = try_all("single", f"single layers {number}/{len(rounds)}", candidates, turn.edits)
    if best[0].score is None and best[0].error:
        raise ArgumentError(f"the method works at none of the layers tried; at layer {best[0].name}: {best[0].error}")
    singles = [trial.layers for trial in best[:2]]
    groups = groups_around(singles, plan.widths, plan.depth)
    last = list(dict.fromkeys([*(singles[:1] if 1 in plan.widths or not groups else []), *groups, plan.default]))
    if groups:
        half = try_all("group", "groups 1/2", last, max(min(2, plan.edits), -(-plan.edits // 2)))
        last = [trial.layers for trial in half[: max(2, -(-len(half) // 2))]]
    best = try_all("group", "groups 2/2" if groups else "default", last, plan.edits)
    both = try_all("held out", "held out", list(dict.fromkeys([best[0].layers, plan.default])), plan.held_out)
    by_layers = {trial.layers: trial for trial in both}
    return Found(best[0], by_layers[best[0].layers], by_layers[plan.default])
