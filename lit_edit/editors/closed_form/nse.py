"""NSE: neuron-level sequential editing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lit_edit.devices.algebra import algebra_device, for_algebra, without_autocast
from lit_edit.editors.base import EditorInfo, Moments, Proposal, Status, Step, Stopwatch, entry_of
from lit_edit.editors.closed_form.key_rows import KeyLine
from lit_edit.editors.closed_form.located import LocatedEditor, asked, told
from lit_edit.editors.closed_form.walk import Walk, as_columns
from lit_edit.errors import ArgumentError, check_least, check_positive
from lit_edit.files.checksum import checksum
from lit_edit.ledger.edit_ledger import Change, LedgerEntry, RecordedFacts
from lit_edit.solvers.functional import selected_gain


@dataclass(frozen=True)
class LayerState:
    """What is carried along for one layer; a step makes a new one.

    Attributes:
        delta: ``(d_out, d_in)``, the sum of the updates of all edits that hold.
        gram: ``(d_in, d_in)``, the sum over their keys.
    """

    delta: Tensor
    gram: Tensor


class NSE(LocatedEditor):
    r"""Sequential editing of selected neurons (NSE, arXiv 2410.04045).

    MEMIT with memory of earlier keys, but (1) targets are those of the original model, as in D4S; (2) a step writes
    only the columns of the neurons that its keys excite most, the smallest set :math:`S` with a share ``neurons`` of
    :math:`\sum_i |k_i|`: :math:`\Delta_S = R K_S^\top (\lambda C + K_p K_p^\top + K K^\top)_{SS}^{-1}`; (3) edits whose
    state is still away from its target are written again, ``passes`` times in all at most. (The released loop ends one
    pass early, and knows the settings of three models by their names.)

    Args:
        covariance_weight: :math:`\lambda`.
        neurons: Share of the keys' mass in the neurons that are written; 1 writes all.
        passes: How often an edit is written at most.
        lower: An edit is not written again once :math:`|z - h|` is below this. A length, as published: 35 for GPT2-XL,
            15 for GPT-J, 2.5 for Llama-3-8B.
        upper: Nor if it is above this: it is given up. Published 150, 100 and 50; by default no edit is.
        kwargs: As for :class:`~lit_edit.editors.closed_form.located.LocatedEditor`.
    """

    about = EditorInfo(
        title="NSE",
        paper="Neuron-Level Sequential Editing for Large Language Models, arXiv 2410.04045",
        kind="closed form",
        cost="target optimisation; per pass and layer a system of the selected neurons, up to d_in^3",
        state="2 d_in^2 + d_in d_out per layer, whatever the number of edits, and half as much again during a step",
        undo="approximate",
        lora=True,
        lacks="the thresholds of its passes are lengths, to be found anew for each model",
    )

    depends_on = "covariance_weight neurons passes lower upper"

    def __init__(
        self,
        covariance_weight: float = 200.0,
        neurons: float = 0.8,
        passes: int = 3,
        lower: float = 1.0,
        upper: float | None = None,
        **kwargs: Any,
    ) -> None:
        check_positive(**{"covariance_weight (lambda)": covariance_weight})
        if not 0 < neurons <= 1:
            raise ValueError(f"neurons must be in (0, 1], got {neurons}")
        check_least(1, passes=passes)
        if not 0 <= lower < (math.inf if upper is None else upper):
            raise ValueError(f"lower must not be negative and must be below upper, got {lower} and {upper}")
        super().__init__(**kwargs)
        self.covariance_weight, self.neurons = covariance_weight, neurons
        self.passes, self.lower, self.upper = passes, lower, upper
        self.priors: dict[int, Tensor] = {}
        self.states: dict[int, LayerState] = {}

    def _begin(self, moments: Moments, status: Status) -> None:
        """Set contexts and priors up."""
        super()._begin(moments, status)
        known, place = moments(), algebra_device(self.ledger.adapter.device)
        self.priors = {n: self.covariance_weight * for_algebra(known[n].to(place)) for n in self.ledger.layers}
        self.states = {
            n: LayerState(prior.new_zeros(self.ledger.adapter.shape(n)), torch.zeros_like(prior))
            for n, prior in self.priors.items()
        }

    def settings(self) -> dict[str, Any]:
        """Return all settings that a result depends on, and what the second moments were."""
        return {**super().settings(), "key statistics": [checksum(prior) for prior in self.priors.values()]}

    # ---- one step -----------------------------------------------------------------------------------------------

    def _work_out(self, step: Step) -> Proposal:
        self._follow()
        before = states = self._without(self.states, step.replaced)
        requests, watch = step.requests, step.watch
        with watch("targets"):
            targets = self._get_targets(step, self.ledger.original())
        wanted = as_columns([target.value for target in targets])
        passes: list[dict[str, Tensor]] = []
        with self.ledger.adapter.fast_products():
            with watch("keys"):
                rows = self._get_key_rows(requests, step.window)
            left = list(range(len(requests)))
            for number in range(self.passes):
                line = rows.of([asked(requests[n]) for n in left])
                missing = self._missing(line, wanted[:, left], states)
                if number > 0:
                    lengths = missing.norm(dim=0).tolist()
                    upper = math.inf if self.upper is None else self.upper
                    kept = [n for n, length in enumerate(lengths) if self.lower < length < upper]
                    left = [left[n] for n in kept]
                    if not left:
                        break
                    line, missing = rows.of([asked(requests[n]) for n in left]), missing[:, kept]
                states, done = self._pass(line, wanted[:, left], missing, states, watch)
                passes.append({"columns": torch.tensor(left), **done})
        tensors = self._joined(passes, len(requests))
        states = self._apply(before, tensors, range(len(requests)), 1.0)  # as it will be repeated, to the bit
        entries = tuple(map(entry_of, requests, map(told, targets)))
        return self._proposal(states, step.change(tensors), tensors[f"keys.{self.ledger.layers[0]}"], entries)

    def _follow(self) -> None:
        """Bring what is carried along to where the algebra is done: the model may have been moved."""
        place = algebra_device(self.ledger.adapter.device)
        self.priors = {n: prior.to(place) for n, prior in self.priors.items()}
        self.states = {n: LayerState(s.delta.to(place), s.gram.to(place)) for n, s in self.states.items()}

    def _missing(self, line: KeyLine, wanted: Tensor, states: Mapping[int, LayerState]) -> Tensor:
        """Return what the states behind the last edited layer lack to their targets, ``(d_model, n)``."""
        walk = Walk(self.ledger, self._view(_deltas(states)), "remeasured", self.templates, Stopwatch())
        return wanted - walk.reached(line).to(wanted)

    def _pass(
        self, line: KeyLine, wanted: Tensor, missing: Tensor, states: Mapping[int, LayerState], watch: Stopwatch
    ) -> tuple[dict[int, LayerState], dict[str, Tensor]]:
        """Write some edits once; return the layers' states and what was done."""
        made, step = dict(states), {}

        def solve(layer: int, keys: Tensor, residuals: Tensor) -> Tensor:
            state = made[layer]
            with without_autocast(keys.device):
                gain = selected_gain(keys, self.priors[layer] + state.gram + _outer(keys), self.neurons)
                made[layer] = replace(state, delta=state.delta + residuals.to(gain) @ gain.T)
            step[f"keys.{layer}"], step[f"gains.{layer}"], step[f"residuals.{layer}"] = keys, gain, residuals
            return self._written(layer, made[layer].delta)

        walk = Walk(self.ledger, self._view(_deltas(states)), "remeasured", self.templates, watch)
        walk.facts(line, wanted, missing, solve)
        return made, step

    def _joined(self, steps: Sequence[Mapping[str, Tensor]], count: int) -> dict[str, Tensor]:
        """Return keys of the first pass, and gains and residuals of all passes, ``(rows, edits, passes)``, by layer."""
        tensors: dict[str, Tensor] = {}
        for layer in self.ledger.layers:
            tensors[f"keys.{layer}"] = steps[0][f"keys.{layer}"]
            for what in ("gains", "residuals"):
                first = steps[0][f"{what}.{layer}"]
                whole = first.new_zeros(first.shape[0], count, len(steps))
                for number, step in enumerate(steps):
                    whole[:, step["columns"].to(whole.device), number] = step[f"{what}.{layer}"].to(whole)
                tensors[f"{what}.{layer}"] = whole
        return tensors

    def _proposal(
        self, states: Mapping[int, LayerState], change: Change, keys: Tensor, entries: tuple[LedgerEntry, ...] = ()
    ) -> Proposal:
        updates = self._updates({n: self._written(n, delta) for n, delta in _deltas(states).items()})
        return Proposal((), updates, entries, (dict(states), keys), change=change)

    def accept(self, proposal: Proposal) -> None:
        """Take the new states."""
        self.states, keys = proposal.pending
        self._note(proposal, keys)

    # ---- taking out and putting back ----------------------------------------------------------------------------

    def _apply(
        self, states: Mapping[int, LayerState], tensors: Mapping[str, Tensor], columns: Sequence[int], sign: float
    ) -> dict[int, LayerState]:
        """Add or take out what some edits of a record have written."""
        made = {}
        for layer, state in states.items():
            keys, gains, residuals = (
                tensors[f"{what}.{layer}"][:, list(columns)].to(state.delta) for what in ("keys", "gains", "residuals")
            )
            with without_autocast(state.delta.device):
                delta = state.delta
                for number in range(gains.shape[2]):
                    delta = delta + sign * (residuals[:, :, number] @ gains[:, :, number].T)
                made[layer] = LayerState(delta, state.gram + sign * _outer(keys))
        return made

    def _without(self, states: Mapping[int, LayerState], recorded: Sequence[RecordedFacts]) -> dict[int, LayerState]:
        made = dict(states)
        for record in recorded:
            made = self._apply(made, record.tensors, record.columns, -1.0)
        return made

    def replay(self, change: Change, entries: Sequence[LedgerEntry], old: Sequence[RecordedFacts]) -> Proposal:
        """Do again what is on record; see :meth:`Editor.replay`."""
        self._follow()
        first = f"keys.{self.ledger.layers[0]}"
        states, keys = dict(self.states), self.states[self.ledger.layers[0]].delta.new_empty(0, 0)
        if change.restored:
            for record in old:
                states = self._apply(states, record.tensors, record.columns, 1.0)
            keys = torch.cat([record.tensors[first][:, list(record.columns)] for record in old], 1)
        else:
            states = self._without(states, old)
        if change.tensors:
            keys = change.tensors[first]
            states = self._apply(states, change.tensors, range(keys.shape[1]), 1.0)
        if self._leaves_nothing(change, entries):
            zero = {n: LayerState(torch.zeros_like(s.delta), torch.zeros_like(s.gram)) for n, s in states.items()}
            states = zero  # no edit holds any more, and what taking them out has left is rounding
        return self._proposal(states, change, keys, tuple(entries))

    # ---- state --------------------------------------------------------------------------------------------------

    def check_state(self, state: Mapping[str, Any], layers: Sequence[int]) -> None:
        """Raise :class:`ArgumentError` if a saved state is of other layers or of another editor."""
        if set(state.get("grams", {})) != {str(layer) for layer in layers}:
            raise ArgumentError("the checkpoint was made by another editing method; use the config it was made with")

    def state_dict(self) -> dict[str, Any]:
        """Return contexts, targets that are fitted but not yet used, and the layers' sums."""
        grams = {str(layer): state.gram for layer, state in self.states.items()}
        return {**super().state_dict(), "grams": grams, "deltas": {str(n): s.delta for n, s in self.states.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict` on a prepared editor; a :class:`ValueError` if it is of layers of another size."""
        loaded = {}
        for layer, own in self.states.items():
            delta, gram = state["deltas"][str(layer)], state["grams"][str(layer)]
            if delta.shape != own.delta.shape or gram.shape != own.gram.shape:
                raise ValueError(f"the checkpoint's sums of layer {layer} do not fit one of {tuple(own.delta.shape)}")
            loaded[layer] = LayerState(delta.to(own.delta, copy=True), gram.to(own.gram, copy=True))
        super().load_state_dict(state)
        self.states = loaded


def _deltas(states: Mapping[int, LayerState]) -> dict[int, Tensor]:
    return {layer: state.delta for layer, state in states.items()}


def _outer(keys: Tensor) -> Tensor:
    with without_autocast(keys.device):
        return keys @ keys.T
