"""UltraEdit: one backward pass per edit, normalised by what all edits so far looked like, and one solve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_edit.editors.base import (
    Deltas,
    EditorInfo,
    Moments,
    Proposal,
    Status,
    Step,
    entry_of,
)
from lit_edit.editors.increments import FactoredEditor, plus
from lit_edit.editors.layer_choice import chosen_layers, existing_layers
from lit_edit.editors.token_gradients import collect_gradients
from lit_edit.editors.transforms.base import UpdateTransform
from lit_edit.errors import ArgumentError, check_not_negative, check_one_of, check_positive
from lit_edit.ledger.edit_ledger import RecordedFacts
from lit_edit.models.adapter import ModelAdapter
from lit_edit.solvers.lifelong_normalization import (
    RidgeScale,
    RunningMoments,
    merge_moments,
    normalise,
    pseudo_values,
    ridge_increment,
)
from lit_edit.text.tokens import continuation, pad_token


class UltraEdit(FactoredEditor):
    r"""Edits without training, subject or statistics of text (UltraEdit, arXiv 2505.14679).

    At the tokens that predict an edit's target, on the current weights, each edited matrix has an input :math:`h` and a
    gradient :math:`g` of the cross entropy at its output. Both are normalised by mean and variance over all edits so
    far, and :math:`D = ((H^\top H + rI)^{-1} H^\top V)^\top` with :math:`v = -\eta \|\hat h\|^2 \hat g` and raw
    :math:`H` is added. There is no optimisation: an edit goes one step in a good direction, and need not arrive.

    The paper edits other matrices for some models as well (gate and up projections for Llama-3 and Qwen2.5). Here, as
    everywhere in this package, it is the down projections of the MLPs, which it edits in Mistral, GPT-J and Phi-4.

    An edit that is taken out takes its part of what its step wrote along, as if the others of the step had been solved
    without it. What later edits saw of it, gradients and moments, stays.

    Args:
        layers: Layers to edit, ascending; by default those from six to eight tenths of the depth, where the published
            choices lie and where it was best on SmolLM2-135M. The layers of the other editors are too low for it.
        eta: :math:`\eta`, the step; 1e-6 as published, for models of 7B: it goes with the model, and has to be tried.
            SmolLM2-135M needs 3e-4 (configs/method/ultraedit.yaml).
        ridge: :math:`r`; 1 as published.
        ridge_scale: Whether :math:`r` is ``absolute``, as published, or ``relative`` to the mean of :math:`\|h\|^2` in
            the step.
        warm_up: As if the moments had seen so many rows of mean zero before
            (:func:`~.solvers.lifelong_normalization.normalise`); 0 as published,
            where a first edit of a single token is normalised to nothing.
        per_layer: Keep moments per layer; else, as published, all layers of the same shape share them.
        transforms: What is done to updates before they are written, in order.

    Attributes:
        moments: Of inputs and gradients side by side, ``(d_in + d_out,)``, by shape or layer.
    """

    about = EditorInfo(
        title="UltraEdit",
        paper="UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing in Language Models, arXiv 2505.14679",
        kind="gradient, closed form",
        cost="one forward and backward pass; n^2 (d_in + d_out) for n target tokens",
        state="mean and variance of d_in + d_out numbers, constant",
        undo="approximate",
        lora=True,
        lacks="one step per edit, which need not arrive; the first steps are badly normalised, larger ones are better",
    )
    depends_on = "eta ridge ridge_scale warm_up per_layer"

    def __init__(
        self,
        layers: Sequence[int] | None = None,
        eta: float = 1e-6,
        ridge: float = 1.0,
        ridge_scale: RidgeScale = "absolute",
        warm_up: float = 0.0,
        per_layer: bool = False,
        transforms: Sequence[UpdateTransform] = (),
    ) -> None:
        check_positive(eta=eta, ridge=ridge)
        check_one_of(("absolute", "relative"), ridge_scale=ridge_scale)
        check_not_negative(warm_up=warm_up)
        super().__init__(transforms)
        self.layers = chosen_layers(layers)
        self.eta, self.ridge, self.warm_up, self.per_layer = eta, ridge, warm_up, per_layer
        self.ridge_scale: RidgeScale = ridge_scale
        self.moments: dict[str, RunningMoments] = {}

    # ---- before the stream --------------------------------------------------------------------------------------

    def resolve_layers(self, adapter: ModelAdapter) -> tuple[int, ...]:
        """Return the layers to edit, those from six to eight tenths of the depth when none were given."""
        first, last = (min(round(share * adapter.n_layers), adapter.n_layers - 1) for share in (0.6, 0.8))
        return existing_layers(adapter, self.layers or tuple(range(first, last + 1)))

    def _begin(self, moments: Moments, status: Status) -> None:
        self.sums, self.moments = {}, {}

    # ---- one step -----------------------------------------------------------------------------------------------

    def _work_out(self, step: Step) -> Proposal:
        watch = step.watch
        with watch("solve"):
            sums = self._added(self.sums, step.replaced, -1)
        with watch("gradients"):
            rows = [continuation(self.tokenizer, request.text, request.target_new) for request in step.requests]
            model = self._model(sums) if step.replaced else self.ledger.adapter
            found = collect_gradients(model, rows, self.ledger.layers, pad_token(self.tokenizer))
        with watch("solve"):
            record = self._facts(found.inputs, found.gradients) | {"owner": found.owner}
            sums = plus(sums, self.increments(record), 1)
        facts = [{"target_loss": loss, "target_probability_before": math.exp(-loss)} for loss in found.losses.tolist()]
        return self._proposal(sums, step.change(record), tuple(map(entry_of, step.requests, facts)), record)

    def _facts(self, inputs: Mapping[int, Tensor], gradients: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Return what is put on record of a step: inputs, pseudo-values, and the moments that led to them."""
        moments = dict(self.moments)
        rows = {layer: torch.cat([inputs[layer], gradients[layer]], 1) for layer in self.ledger.layers}
        for layer, value in rows.items():
            name = self._name(layer)
            moments[name] = merge_moments(moments.get(name, RunningMoments.none(value)), value)
        tensors: dict[str, Tensor] = {}
        for layer, value in rows.items():  # once all layers of a shape have been counted
            scaled = normalise(value, moments[self._name(layer)], self.warm_up)
            width = inputs[layer].shape[1]
            tensors[f"inputs.{layer}"] = inputs[layer]
            tensors[f"values.{layer}"] = pseudo_values(scaled[:, :width], scaled[:, width:], self.eta)
        for name in dict.fromkeys(map(self._name, self.ledger.layers)):
            for part, tensor in _as_state(moments[name]).items():
                tensors[f"{part}.{name}"] = tensor
        return tensors

    def _name(self, layer: int) -> str:
        """Return what the moments of a layer are called."""
        rows, columns = self.ledger.adapter.shape(layer)
        return str(layer) if self.per_layer else f"{rows}x{columns}"

    # ---- what a step has added --------------------------------------------------------------------------------------

    def product(self, inputs: Tensor, values: Tensor) -> Tensor:
        """Return the increment ``(d_out, d_in)`` that some tokens make."""
        return ridge_increment(inputs, values, self.ridge, self.ridge_scale)

    def share(self, recorded: RecordedFacts) -> Deltas:
        """Return what some edits of a step have added: the rest is as if it had been solved without them."""
        whole = self._increments(recorded.tensors, [*recorded.rest, *recorded.columns])
        return plus(whole, self._increments(recorded.tensors, recorded.rest), -1) if recorded.rest else whole

    def remember(self, record: Mapping[str, Tensor]) -> None:
        """Take the moments of a step; those of edits that are taken out stay."""
        for name in dict.fromkeys(map(self._name, self.ledger.layers)) if record else ():
            self.moments[name] = self._from_state({part: record[f"{part}.{name}"] for part in _PARTS})

    # ---- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of the increments, and the moments."""
        moments = {name: _as_state(moments) for name, moments in self.moments.items()}
        own = {"per_layer": self.per_layer, "transformed": bool(self.transforms), "moments": moments}
        return {**super().state_dict(), **own}

    def check_state(self, state: Mapping[str, Any], layers: Sequence[int]) -> None:
        """Raise :class:`ArgumentError` if a saved state is of other layers, settings, or another method."""
        super().check_state(state, layers)
        if bool(state["per_layer"]) != self.per_layer:
            raise ArgumentError(
                f"the checkpoint was made with per_layer={state['per_layer']}, this editor has {self.per_layer}; use "
                "the config that it was made with"
            )
        if bool(state["transformed"]) != bool(self.transforms):
            raise ArgumentError(
                "the checkpoint was made with other transforms; use the config that the checkpoint was made with"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore sums and moments on a prepared editor."""
        super().load_state_dict(state)
        self.moments = {name: self._from_state(saved) for name, saved in state["moments"].items()}

    def _from_state(self, state: Mapping[str, Tensor]) -> RunningMoments:
        return RunningMoments(int(state["count"]), self._here(state["mean"]), self._here(state["squares"]))


_PARTS = ("count", "mean", "squares")


def _as_state(moments: RunningMoments) -> dict[str, Tensor]:
    return {"count": torch.tensor(moments.count), "mean": moments.mean, "squares": moments.squares}
