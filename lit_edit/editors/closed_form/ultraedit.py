"""UltraEdit: one backward pass per edit, normalised by what all edits so far looked like, and one solve."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_edit.data.request import EditRequest
from lit_edit.devices.algebra import algebra_device, algebra_dtype, for_algebra
from lit_edit.editors.base import Editor, EditorInfo, Proposal, Status, Stopwatch, silent
from lit_edit.editors.layer_choice import chosen_layers, existing_layers
from lit_edit.editors.token_gradients import collect_gradients
from lit_edit.editors.transforms.base import UpdateTransform, transformed
from lit_edit.errors import ArgumentError
from lit_edit.ledger.edit_ledger import Change, EditLedger, LayerUpdate, LedgerEntry, RecordedFacts
from lit_edit.solvers.lifelong import (
    RidgeScale,
    RunningMoments,
    merge_moments,
    normalise,
    pseudo_values,
    ridge_increment,
)
from lit_edit.text.tokens import check_tokenizer, continuation, pad_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lit_edit.models.adapter import ModelAdapter
    from lit_edit.stats.second_moment import KeyStatistics


@dataclass(frozen=True)
class _Pending:
    """What the editor takes in once it is written: solutions by layer, and the moments by name."""

    solutions: dict[int, Tensor]
    moments: dict[str, RunningMoments]


class UltraEdit(Editor):
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
        warm_up: As if the moments had seen so many rows of mean zero before (:func:`~.solvers.lifelong.normalise`);
            0 as published, where a first edit of a single token is normalised to nothing.
        per_layer: Keep moments per layer; else, as published, all layers of the same shape share them.
        transforms: What is done to updates before they are written, in order.

    Attributes:
        moments: Of inputs and gradients side by side, ``(d_in + d_out,)``, by shape or layer.
        solutions: By layer, ``(d_out, d_in)``: what has been solved, where that is not what is written.
    """

    about = EditorInfo(
        title="UltraEdit",
        paper="UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing in Language Models, arXiv 2505.14679",
        kind="gradient, closed form",
        cost="one forward and backward pass; n^2 (d_in + d_out) for n target tokens",
        state="mean and variance of d_in + d_out numbers, constant",
        batch=True,
        undo="approximate",
        lora=True,
        devices=False,
        lacks="one step per edit, which need not arrive; the first steps are badly normalised, larger ones are better",
    )

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
        for name, value in (("eta", eta), ("ridge", ridge)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if ridge_scale not in ("absolute", "relative"):
            raise ValueError(f"ridge_scale must be 'absolute' or 'relative', got {ridge_scale!r}")
        if not 0 <= warm_up < math.inf:
            raise ValueError(f"warm_up must not be negative or infinite, got {warm_up}")
        self.layers = chosen_layers(layers)
        self.eta = eta
        self.ridge = ridge
        self.ridge_scale: RidgeScale = ridge_scale
        self.warm_up = warm_up
        self.per_layer = per_layer
        self.transforms = tuple(transforms)
        self.moments: dict[str, RunningMoments] = {}
        self.solutions: dict[int, Tensor] = {}

    # ---- before the stream --------------------------------------------------------------------------------------

    def resolve_layers(self, adapter: ModelAdapter) -> tuple[int, ...]:
        """Return the layers to edit, those from six to eight tenths of the depth when none were given."""
        first, last = (min(round(share * adapter.n_layers), adapter.n_layers - 1) for share in (0.6, 0.8))
        return existing_layers(adapter, self.layers or tuple(range(first, last + 1)))

    def prepare(
        self,
        ledger: EditLedger,
        tokenizer: PreTrainedTokenizerBase,
        statistics: KeyStatistics | Mapping[int, Tensor],
        status: Status = silent,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Forget earlier edits; nothing is computed, and ``statistics`` are not asked for."""
        check_tokenizer(tokenizer)
        self.ledger, self.tokenizer = ledger, tokenizer
        self.moments, self.solutions = {}, {}

    def settings(self) -> dict[str, Any]:
        """Return all settings that a result depends on."""
        return {
            **super().settings(),
            "layers": list(self.ledger.layers),
            "eta": self.eta,
            "ridge": self.ridge,
            "ridge_scale": self.ridge_scale,
            "warm_up": self.warm_up,
            "per_layer": self.per_layer,
            "transforms": [transform.settings() for transform in self.transforms],
        }

    # ---- one step -----------------------------------------------------------------------------------------------

    def propose(
        self,
        requests: Sequence[EditRequest],
        window: Sequence[EditRequest] = (),
        status: Status = silent,
        replaced: Sequence[RecordedFacts] = (),
    ) -> Proposal:
        """Work out the updates for some requests; see :meth:`Editor.propose`."""
        watch = Stopwatch()
        with watch("solve"):
            solutions = self._exchanged(replaced, out=True)
        with watch("gradients"):
            rows = [continuation(self.tokenizer, request.text, request.target_new) for request in requests]
            model = self._model(solutions) if replaced else self.ledger.adapter
            found = collect_gradients(model, rows, self.ledger.layers, pad_token(self.tokenizer))
        with watch("solve"):
            tensors = self._facts(found.inputs, found.gradients) | {"owner": found.owner}
        entries = tuple(
            LedgerEntry(
                r.id,
                r.subject,
                r.text,
                r.target_new,
                {"target_loss": loss, "target_probability_before": math.exp(-loss)},
                r.as_dict(),
            )
            for r, loss in zip(requests, found.losses.tolist(), strict=True)
        )
        numbers = tuple(number for recorded in replaced for number in recorded.numbers)
        change = Change(removed=numbers, tensors=tensors)
        return self._proposal(solutions, change, entries, tuple(requests), watch)

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

    def _increments(self, tensors: Mapping[str, Tensor], columns: Sequence[int] | None = None) -> dict[int, Tensor]:
        """Return what a step writes, or would have written with some of its edits only: by layer, ``(d_out, d_in)``."""
        place = algebra_device(self.ledger.adapter.device)
        owner = tensors["owner"]
        wanted = owner if columns is None else torch.tensor(columns, dtype=torch.long)
        chosen = torch.isin(owner, wanted).nonzero()[:, 0]
        return {
            layer: ridge_increment(
                tensors[f"inputs.{layer}"][chosen].to(place),
                tensors[f"values.{layer}"][chosen].to(place),
                self.ridge,
                self.ridge_scale,
            )
            for layer in self.ledger.layers
        }

    def _proposal(
        self,
        solutions: dict[int, Tensor],
        change: Change,
        entries: tuple[LedgerEntry, ...] = (),
        requests: tuple[EditRequest, ...] = (),
        watch: Stopwatch | None = None,
    ) -> Proposal:
        """Add what is new to the solutions; a step that is made and one that is repeated both end here."""
        watch = Stopwatch() if watch is None else watch
        moments = dict(self.moments)
        with watch("solve"):
            if change.tensors:
                new = self._increments(change.tensors)
                solutions = {layer: solutions[layer] + new[layer] for layer in solutions}
                for name in dict.fromkeys(map(self._name, self.ledger.layers)):
                    state = {part: change.tensors[f"{part}.{name}"] for part in ("count", "mean", "squares")}
                    moments[name] = self._from_state(state)
            elif not change.restored and {e.number for e in self.ledger.entries} <= set(change.removed):
                # No edit holds any more, and what taking them out has left is rounding.
                solutions = {layer: torch.zeros_like(delta) for layer, delta in solutions.items()}
            updates = tuple(
                LayerUpdate(layer, self.ledger.names[layer], self._written(layer, delta))
                for layer, delta in solutions.items()
            )
        return Proposal(requests, updates, entries, _Pending(solutions, moments), watch.seconds, change)

    def _solutions(self) -> dict[int, Tensor]:
        """Return what has been solved so far, by layer; zeros before the first edit."""
        known: dict[int, Tensor] = {}
        for layer, name in self.ledger.names.items():
            delta = self.solutions.get(layer) if self.transforms else self.ledger.deltas.get(name)
            place = algebra_device(self.ledger.adapter.device)
            if delta is None:
                delta = torch.zeros(self.ledger.adapter.shape(layer), dtype=algebra_dtype(place), device=place)
            known[layer] = delta.to(place)  # the model may have been moved
        return known

    def _written(self, layer: int, delta: Tensor) -> Tensor:
        """Return what is written for a layer's solution."""
        if not self.transforms:
            return delta
        base = for_algebra(self.ledger.base[self.ledger.names[layer]])
        return transformed(delta, self.ledger.adapter.to_layout(layer, base).to(delta), self.transforms)

    def _model(self, solutions: Mapping[int, Tensor]) -> ModelAdapter:
        """Return the model as it is with other solutions."""
        weights = {
            self.ledger.names[layer]: self.ledger.edited_weight(layer, self._written(layer, delta))
            for layer, delta in solutions.items()
        }
        return self.ledger.adapter.with_weights(weights)

    def accept(self, proposal: Proposal) -> None:
        """Take the new moments, and the solutions where they are not what is written."""
        self.moments = proposal.pending.moments
        self.solutions = proposal.pending.solutions if self.transforms else {}

    # ---- repeating, taking out and putting back -----------------------------------------------------------------

    def replay(self, change: Change, entries: Sequence[LedgerEntry], old: Sequence[RecordedFacts]) -> Proposal:
        """Do again what is on record; see :meth:`Editor.replay`."""
        return self._proposal(self._exchanged(old, out=not change.restored), change, tuple(entries))

    def retract(self, facts: Sequence[RecordedFacts], reason: str = "", exact: bool = False) -> Proposal:
        """Work out the updates without some edits; see :meth:`Editor.retract`.

        Raises:
            ArgumentError: If later edits are to be made again.
        """
        if exact:
            raise ArgumentError(
                "UltraEdit cannot make later edits again as if some had never been (exact): run the stream again "
                "without them, or take them out as they are"
            )
        numbers = tuple(sorted(number for recorded in facts for number in recorded.numbers))
        return self._proposal(self._exchanged(facts, out=True), Change("undo", removed=numbers, reason=reason))

    def reinstate(self, facts: Sequence[RecordedFacts]) -> Proposal:
        """Work out the updates with some edits put back; see :meth:`Editor.reinstate`."""
        numbers = tuple(number for recorded in facts for number in recorded.numbers)
        return self.replay(Change("redo", restored=numbers), (), facts)

    def _exchanged(self, facts: Sequence[RecordedFacts], out: bool) -> dict[int, Tensor]:
        """Return the solutions with some edits taken out of their steps, or put back into them."""
        solutions = self._solutions()
        for recorded in facts:
            few, many = sorted(recorded.rest), sorted([*recorded.rest, *recorded.columns])
            for columns, sign in ((many, -1 if out else 1), (few, 1 if out else -1)):
                if columns:
                    part = self._increments(recorded.tensors, columns)
                    solutions = {layer: delta + sign * part[layer] for layer, delta in solutions.items()}
        return solutions

    # ---- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the moments, and the solutions where they are not what is written."""
        return {
            "editor": type(self).__name__,
            "layers": list(self.ledger.layers),
            "per_layer": self.per_layer,
            "moments": {name: _as_state(moments) for name, moments in self.moments.items()},
            "solutions": {str(layer): delta for layer, delta in self.solutions.items()},
        }

    def check_state(self, state: Mapping[str, Any], layers: Sequence[int]) -> None:
        """Raise :class:`ArgumentError` if a saved state is of other layers or of another editor."""
        if state.get("editor") != type(self).__name__:
            raise ArgumentError(
                "the checkpoint was made by another editing method; use the config that it was made with"
            )
        if list(state["layers"]) != list(layers):
            raise ArgumentError(
                f"the checkpoint edits layers {list(state['layers'])}, this editor {list(layers)}; use the config "
                "that the checkpoint was made with"
            )
        if bool(state["per_layer"]) != self.per_layer:
            raise ArgumentError(
                f"the checkpoint was made with per_layer={state['per_layer']}, this editor has {self.per_layer}; use "
                "the config that it was made with"
            )
        if state["moments"] and bool(state["solutions"]) != bool(self.transforms):
            raise ArgumentError(
                "the checkpoint was made with other transforms; use the config that the checkpoint was made with"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict` on a prepared editor.

        Raises:
            ArgumentError: If the state is of other layers or another kind of editor.
        """
        self.check_state(state, self.ledger.layers)
        place = algebra_device(self.ledger.adapter.device)
        self.moments = {name: self._from_state(saved) for name, saved in state["moments"].items()}
        self.solutions = {int(layer): delta.to(place) for layer, delta in state["solutions"].items()}

    def _from_state(self, state: Mapping[str, Tensor]) -> RunningMoments:
        place = algebra_device(self.ledger.adapter.device)
        return RunningMoments(int(state["count"]), state["mean"].to(place), state["squares"].to(place))


def _as_state(moments: RunningMoments) -> dict[str, Tensor]:
    return {"count": torch.tensor(moments.count), "mean": moments.mean, "squares": moments.squares}
