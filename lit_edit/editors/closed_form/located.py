"""What locating editors share: layers, contexts, targets, and the rows at which keys are read."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from lit_edit.data.request import EditRequest
from lit_edit.data.sources import load_requests
from lit_edit.devices.algebra import for_algebra
from lit_edit.editors.base import Deltas, Editor, Moments, Proposal, Status, Step, Stopwatch, silent
from lit_edit.editors.closed_form.key_index import KeyIndex
from lit_edit.editors.closed_form.key_rows import KeyRows
from lit_edit.editors.closed_form.walk import Measured, Walk
from lit_edit.editors.layer_choice import chosen_layers, existing_layers
from lit_edit.editors.transforms.base import UpdateTransform, transformed
from lit_edit.editors.transforms.norm_anchor import NormAnchor, anchor_targets, reference_norm
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.presets import edit_layer, edit_layers
from lit_edit.targets.contexts import STARTS, Templates, check_templates, sample_templates
from lit_edit.targets.optimize import DivergedError, Target, TargetSettings, optimise_targets
from lit_edit.targets.problem import build_problem
from lit_edit.text.tokens import pad_token

log = logging.getLogger(__name__)

DEFAULT_TARGET = TargetSettings(probability=0.95)
"""The published settings, but an edit stops once its target is said everywhere with this probability: going on until
the loss is 0.05 writes more and costs locality (measured: docs/settings.md)."""

Contexts = Literal["sampled", "plain"]


class LocatedEditor(Editor):
    r"""Fits a target state at the subject's last token, for the MLP down projections of some layers to bring about.

    Args:
        layers: Layers to edit, ascending; by default those published for the model's family and size.
        target: Settings of the target optimisation.
        contexts: ``sampled`` (short texts by the unedited model, as published), ``plain`` (none), or the groups of
            templates themselves.
        context_count: How many texts to sample, one to five; the time of an edit goes with it.
        seed: Seeds the sampled contexts.
        transforms: What is done to updates before they are written, in order (:mod:`lit_edit.editors.transforms`).
        norm_anchor: Norm-anchor scaling of the targets (:class:`lit_edit.editors.NormAnchor`); by default none.

    Attributes:
        on_original: Targets are fitted on the original weights (else on the current ones).
        measured: What targets are targets of.
        single_layer: By default one layer is edited, the one published for ROME, and not several.
        targets: Targets that are fitted and not yet used, by the edit's id, with what they were fitted for.
        known: Finds edits by their keys.
    """

    on_original: bool = True
    measured: ClassVar[Measured] = "state"
    single_layer: ClassVar[bool] = False
    depends_on = "context_count seed"

    def __init__(
        self,
        layers: Sequence[int] | None = None,
        target: TargetSettings = DEFAULT_TARGET,
        contexts: Contexts | list[list[str]] = "sampled",
        context_count: int = 5,
        seed: int = 0,
        transforms: Sequence[UpdateTransform] = (),
        norm_anchor: NormAnchor | None = None,
    ) -> None:
        if isinstance(contexts, str) and contexts not in ("sampled", "plain"):
            raise ValueError(f"contexts must be 'sampled', 'plain' or groups of templates, got {contexts!r}")
        if not 1 <= context_count <= len(STARTS):
            raise ValueError(f"context_count must be 1 to {len(STARTS)}, got {context_count}")
        if (target.moved == "modules") != (self.measured == "mlp"):
            raise ValueError(
                f"target.moved must be {'modules' if self.measured == 'mlp' else 'state'!r} for {type(self).__name__}, "
                f"got {target.moved!r}"
            )
        if norm_anchor is not None and self.measured == "mlp":
            raise ValueError(f"norm_anchor is for targets behind a layer; {type(self).__name__} has others")
        self.layers = chosen_layers(layers)
        self.target = target
        self.contexts = contexts if isinstance(contexts, str) else check_templates(contexts)
        self.context_count = context_count
        self.seed = seed
        self.transforms = tuple(transforms)
        self.norm_anchor = norm_anchor
        self._reference: float | None = None  # of norm_anchor, once it is known
        self.templates: Templates = ()
        self.targets: dict[str, tuple[str, Target]] = {}  # by id: what was asked for, and its target
        self.known: KeyIndex | None = None
        self._key_rows: KeyRows | None = None
        self._failed: dict[str, FloatingPointError] = {}  # what was asked for in the window and diverged

    # ---- before the stream --------------------------------------------------------------------------------------

    def resolve_layers(self, adapter: ModelAdapter) -> tuple[int, ...]:
        """Return the layers to edit, those of the model's preset when none were given."""
        preset = (edit_layer(adapter),) if self.single_layer else edit_layers(adapter)
        return existing_layers(adapter, self.layers or preset)

    def _begin(self, moments: Moments, status: Status) -> None:
        """Set contexts up, and forget what an earlier stream has left."""
        self.templates = self._make_templates(self.ledger.original())
        self.known = KeyIndex(self.ledger.adapter.shape(self.ledger.layers[0])[1])
        self.targets.clear()
        self._failed.clear()
        self._key_rows = None
        self._reference = None if self.norm_anchor is None else self.norm_anchor.reference

    def settings(self) -> dict[str, Any]:
        """Return all settings that targets depend on."""
        return {
            **super().settings(),
            "layers": list(self.ledger.layers),
            **{f"target.{name}": value for name, value in asdict(self.target).items()},
            "contexts": self.contexts if isinstance(self.contexts, str) else [list(group) for group in self.contexts],
            **({"transforms": [transform.settings() for transform in self.transforms]} if self.transforms else {}),
            **({} if self.norm_anchor is None else {"norm_anchor": asdict(self.norm_anchor)}),
        }

    def opening(self) -> dict[str, Any]:
        """Return the sampled contexts, and the length that norm-anchor scaling gives to what is written."""
        anchored = {} if self.norm_anchor is None else {"reference": self._anchor_length(self.norm_anchor, silent)}
        return {"templates": [list(group) for group in self.templates], **anchored}

    def reopen(self, opening: Mapping[str, Any]) -> None:
        """Go on with the contexts of an earlier process."""
        self.templates = check_templates(opening["templates"])
        self._reference = opening.get("reference")

    def _make_templates(self, original: ModelAdapter) -> Templates:
        if self.contexts == "plain":
            return (("{}",),)
        if self.contexts == "sampled":
            sampled = sample_templates(original, self.tokenizer, self.seed, STARTS[: self.context_count])
            return check_templates(original.ranks.agree([list(group) for group in sampled]))
        return check_templates(self.contexts)

    # ---- what a method does with it -----------------------------------------------------------------------------

    def _written(self, layer: int, delta: Tensor) -> Tensor:
        """Return what is written for a layer's solution."""
        if not self.transforms:
            return delta
        base = for_algebra(self.ledger.base[self.ledger.names[layer]])
        return transformed(delta, self.ledger.adapter.to_layout(layer, base).to(delta), self.transforms)

    def _view(self, deltas: Deltas) -> ModelAdapter:
        """Return the model with what is written for other solutions than its own."""
        return self.ledger.preview(self._updates({n: self._written(n, delta) for n, delta in deltas.items()}))

    def _note(self, proposal: Proposal, keys: Tensor) -> None:
        """Know the edits of a committed proposal by their keys ``(d_in, n)``, and forget their targets."""
        change = proposal.change
        if self.known is not None:
            self.known.remove([*change.removed, *change.rewritten])
            self.known.add([*(e.number for e in proposal.entries), *change.rewritten, *change.restored], keys)
        for entry in proposal.entries:
            self.targets.pop(entry.id, None)

    def similar(self, requests: Sequence[EditRequest], window: Sequence[EditRequest]) -> list[list[tuple[int, float]]]:
        """Return, per request, the edits with the nearest keys at the first edited layer, and the cosines."""
        if self.known is None or not self.known.numbers:
            return [[] for _ in requests]
        walk = Walk(self.ledger, self.ledger.original(), "remeasured", self.templates, Stopwatch())
        with self.ledger.adapter.fast_products():
            rows = self._get_key_rows(requests, window)
            keys = walk.first_keys(rows.of([asked(r) for r in requests]))
        found = [self.known.nearest(keys[:, column]) for column in range(len(requests))]
        return [[(number, cosine) for number, cosine in row] for row in self.ledger.adapter.ranks.agree(found)]

    # ---- targets ------------------------------------------------------------------------------------------------

    def _get_targets(self, step: Step, model: ModelAdapter) -> list[Target]:
        requests, window, status = step.requests, step.window, step.status
        ready = all(asked(r) in self._failed or self.targets.get(r.id, ("",))[0] == asked(r) for r in requests)
        if not ready and not self.on_original:
            return self._optimise(requests, model, status)
        if not ready:
            self._fit_together(list(window if all(r in window for r in requests) else requests), model, status)
        for request in requests:
            if asked(request) in self._failed:
                raise self._failed[asked(request)]
        return [self.targets[r.id][1] for r in requests]

    def fit_ahead(self, requests: Sequence[EditRequest], status: Status = silent) -> None:
        """Fit the targets of edits together, each of which is then to be made alone, from the original weights.

        Together they take a fraction of the time. Editors whose targets are fitted on the edited model use them all the
        same: only whoever takes every edit back before the next may call this.
        """
        self._fit_together(list(requests), self.ledger.original(), status)

    def _fit_together(self, group: list[EditRequest], model: ModelAdapter, status: Status) -> None:
        self.targets, self._failed = {}, {}
        while group:
            try:
                made = self._optimise(group, model, status)
            except _TargetDivergedError as error:  # the others are not to suffer for it
                self._failed |= self._blame(group, error, model)
                group = [r for r in group if asked(r) not in self._failed]
            else:
                self.targets = {r.id: (asked(r), target) for r, target in zip(group, made, strict=True)}
                break

    def _blame(
        self, group: Sequence[EditRequest], error: _TargetDivergedError, model: ModelAdapter
    ) -> dict[str, FloatingPointError]:
        """Return which targets of a group diverge by themselves: one row without numbers may take others along."""
        first = next(request for request in group if request.id == error.id)
        found: dict[str, FloatingPointError] = {}
        for suspects in ([first], group):
            for request in suspects:
                try:
                    self._optimise([request], model, silent)
                except _TargetDivergedError as own:
                    found[asked(request)] = own
            if found:
                return found
        return {asked(first): error}

    def _optimise(self, requests: Sequence[EditRequest], adapter: ModelAdapter, status: Status) -> list[Target]:
        if self.norm_anchor is None:
            return self._fit(requests, adapter, self.templates, status)
        reference = self._anchor_length(self.norm_anchor, status)
        targets = self._fit(requests, adapter, self.templates, status, outputs=True)
        return [self._anchored(r, t, reference) for r, t in zip(requests, targets, strict=True)]

    def _anchored(self, request: EditRequest, target: Target, reference: float) -> Target:
        """Return a target whose written part has the reference length; see :class:`lit_edit.editors.NormAnchor`."""
        assert self.norm_anchor is not None  # noqa: S101 - for the type checker
        assert target.output is not None  # noqa: S101 - it was asked for
        columns = (target.value[:, None], target.base[:, None], target.output[:, None])
        anchored = anchor_targets(*columns, reference, self.norm_anchor.factor)
        if bool(anchored.dropped):
            log.warning(
                "edit %r (%r -> %r) changes nothing: what it wants written is longer than %g times the reference "
                "length (norm_anchor)",
                request.id,
                request.text,
                request.target_new,
                self.norm_anchor.factor,
            )
        return replace(target, delta=anchored.targets[:, 0] - target.base)

    def _anchor_length(self, settings: NormAnchor, status: Status) -> float:
        if self._reference is None:
            sample, _ = load_requests("builtin", limit=settings.samples)
            status(f"norm anchor: fitting {len(sample)} targets")
            targets = self._fit(sample, self.ledger.original(), (("{}",),), status, outputs=True)
            lengths = [float((t.output + t.delta).norm()) for t in targets if t.output is not None]
            self._reference = reference_norm(lengths, settings.drop)
        return self._reference

    def _fit(
        self,
        requests: Sequence[EditRequest],
        adapter: ModelAdapter,
        templates: Templates,
        status: Status,
        outputs: bool = False,
    ) -> list[Target]:
        problems = [build_problem(self.tokenizer, r, templates) for r in requests]
        what = repr(requests[0].subject) if len(requests) == 1 else f"{len(requests)} edits"
        try:
            return optimise_targets(
                adapter,
                problems,
                self.ledger.layers[-1],
                self.target,
                pad_token(self.tokenizer),
                lambda step, steps: status(f"fitting targets of {what}: step {step + 1}/{steps}"),
                outputs,
            )
        except DivergedError as error:
            request = requests[error.index]
            raise _TargetDivergedError(
                request.id,
                f"the target of edit {request.id!r} ({request.text!r} -> {request.target_new!r}) diverged at step "
                f"{error.step}; nothing of it was written. Use a smaller learning rate "
                f"(model.editor.init_args.target.lr, now {self.target.lr})",
            ) from None

    def _get_key_rows(self, requests: Sequence[EditRequest], window: Sequence[EditRequest]) -> KeyRows:
        if self._key_rows is None or not self._key_rows.holds([asked(r) for r in requests]):
            # The same rows together whatever was done before: a resumed run computes the very same batch.
            self._key_rows = self._make_key_rows(window if all(r in window for r in requests) else requests)
        return self._key_rows

    def _make_key_rows(self, requests: Sequence[EditRequest]) -> KeyRows:
        problems = {asked(r): build_problem(self.tokenizer, r, self.templates) for r in requests}
        return KeyRows(self.ledger.adapter, problems, self.ledger.layers[0], pad_token(self.tokenizer))

    # ---- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return contexts, known keys, and targets that are fitted but not yet used."""
        return {
            "targets": {name: {"asked": asked, **target.as_state()} for name, (asked, target) in self.targets.items()},
            "templates": [list(group) for group in self.templates],
            "known": None if self.known is None else self.known.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict` on a prepared editor."""
        self.templates = check_templates(state["templates"])
        if self.known is not None and state.get("known") is not None:
            self.known.load_state_dict(state["known"])
        self.targets = {name: (saved["asked"], Target.from_state(saved)) for name, saved in state["targets"].items()}
        self._key_rows = None


def asked(request: EditRequest) -> str:
    """Tell requests apart by all that their targets depend on."""
    return "\x1f".join((request.id, request.prompt, request.subject, request.target_new))


class _TargetDivergedError(FloatingPointError):
    """The target of one edit left the finite numbers."""

    def __init__(self, id: str, message: str) -> None:
        super().__init__(message)
        self.id = id


def told(target: Target) -> dict[str, float]:
    """Return what the ledger is to tell of a target."""
    return {
        "target_probability_before": target.probability_before,
        "target_probability": target.probability,
        "target_loss": target.trace[-1][0],
        "target_steps": float(len(target.trace)),
        "residual_norm": float(target.delta.norm()),
        "state_norm": float(target.base.norm()),
    }
