"""The engine of the closed-form editors: targets, one walk for the keys, one solve per layer.

D4S, sequential MEMIT and their relatives are settings of it: on which weights targets and residuals are measured, how
the residual is spread over the layers, and whether earlier facts are remembered.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor

from lit_edit.data.request import EditRequest
from lit_edit.data.sources import load_requests
from lit_edit.devices import algebra_device, for_algebra
from lit_edit.editors.base import Proposal, Status, Stopwatch, silent
from lit_edit.editors.facts import Facts, join_facts
from lit_edit.editors.key_index import KeyIndex
from lit_edit.editors.key_rows import KeyRows
from lit_edit.editors.norm_anchor import NormAnchor, anchor_targets, reference_norm
from lit_edit.editors.reversible import ReversibleEditor, asked
from lit_edit.editors.transforms import UpdateTransform, transformed
from lit_edit.editors.trial import Trial
from lit_edit.editors.walk import ResidualMode, Walk, alone, as_columns
from lit_edit.errors import ArgumentError
from lit_edit.ledger import Change, EditLedger, LayerUpdate, LedgerEntry, RecordedFacts
from lit_edit.models.presets import edit_layers
from lit_edit.solvers.ridge import RidgeSolver, RidgeStep
from lit_edit.solvers.shared import OwnSolver, SharedSolver, Solver
from lit_edit.solvers.storage import SolverStorage
from lit_edit.targets.contexts import STARTS, Templates, check_templates, sample_templates
from lit_edit.targets.optimize import DivergedError, Target, TargetSettings, optimise_targets
from lit_edit.targets.problem import build_problem
from lit_edit.tokens import check_tokenizer, pad_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lit_edit.models.adapter import ModelAdapter
    from lit_edit.stats.second_moment import KeyStatistics

log = logging.getLogger(__name__)

DEFAULT_TARGET = TargetSettings(probability=0.95)
"""The published settings, but an edit stops once its target is said everywhere with this probability: going on until
the loss is 0.05 writes more and costs locality (measured: docs/settings.md)."""

Contexts = Literal["sampled", "plain"]
KeyMode = Literal["walked", "base"]


@dataclass(frozen=True)
class _Pending:
    """What the editor takes in once it is written: steps by layer, and the keys to know the new edits by."""

    steps: dict[int, list[RidgeStep]]
    keys: Tensor


class ClosedFormEditor(ReversibleEditor):
    r"""Locate, fit a target, and solve least squares in the MLP down projections of some layers.

    Args:
        layers: Layers to edit, ascending; by default those published for the model's family and size.
        covariance_weight: :math:`\lambda`, how much a key of ordinary text weighs against one of an edit.
        residual: How the residual :math:`r` is spread over the :math:`n` layers: ``remeasured`` measures it again after
            each layer and writes ``1/(remaining layers)`` of what is left (MEMIT); ``shared`` measures once and still
            divides by the remaining layers (the released D4S code, which writes 2.28 times the residual over five
            layers); ``uniform`` writes :math:`r/n` everywhere; ``root`` is ``remeasured`` with the square root of the
            number of remaining layers (PMET); ``ends`` writes half into the first and what is left into the last layer,
            and nothing between (after BLUE, arXiv 2502.03748).
        target: Settings of the target optimisation.
        keys: Where keys are read: ``walked`` reads each layer's with all that has been written into the layers below
            (MEMIT, the released D4S); ``base`` reads them, and measures residuals, as if the edit were the only one
            ever made. Facts then depend on no other edit: the order does not matter, and undo is exact.
        contexts: ``sampled`` (short texts by the unedited model, as published), ``plain`` (none), or the groups of
            templates themselves.
        context_count: How many texts to sample, one to five; the time of an edit goes with it.
        seed: Seeds the sampled contexts.
        ridge: Added to the diagonal of the second moment, relative to its mean.
        storage: Type and place of the solver's matrices, for layers too large for the memory at hand.
        transforms: What is done to updates before they are written, in order (:mod:`lit_edit.editors.transforms`).
        norm_anchor: Norm-anchor scaling of the targets (:mod:`lit_edit.editors.norm_anchor`); by default none.

    Attributes:
        on_original: Targets and residuals are measured on the original weights (else on the current ones).
        memory: Earlier facts stay in the least-squares problem. On current weights they stay what they were made to be.
        targets: Targets that are fitted and not yet used, by the edit's id, with what they were fitted for.
    """

    on_original: bool = True
    memory: bool = True

    def __init__(
        self,
        layers: Sequence[int] | None = None,
        covariance_weight: float = 200.0,
        residual: ResidualMode = "remeasured",
        target: TargetSettings = DEFAULT_TARGET,
        keys: KeyMode = "walked",
        contexts: Contexts | list[list[str]] = "sampled",
        context_count: int = 5,
        seed: int = 0,
        ridge: float = 0.0,
        storage: SolverStorage = SolverStorage(),  # noqa: B008 - frozen
        transforms: Sequence[UpdateTransform] = (),
        norm_anchor: NormAnchor | None = None,
    ) -> None:
        if layers is not None and (len(layers) == 0 or list(layers) != sorted(set(layers)) or min(layers) < 0):
            raise ValueError(f"layers must be ascending, different and not negative, got {list(layers)}")
        if not 0 < covariance_weight < float("inf"):
            raise ValueError(f"covariance_weight (lambda) must be positive and finite, got {covariance_weight}")
        if residual not in get_args(ResidualMode):
            raise ValueError(f"residual must be one of {', '.join(get_args(ResidualMode))}, got {residual!r}")
        if keys not in ("walked", "base"):
            raise ValueError(f"keys must be 'walked' or 'base', got {keys!r}")
        if keys == "base" and not self.on_original:
            raise ValueError(f"keys='base' reads the original model, {type(self).__name__} measures on the current one")
        if not 0 <= ridge < float("inf"):
            raise ValueError(f"ridge must not be negative or infinite, got {ridge}")
        if isinstance(contexts, str) and contexts not in ("sampled", "plain"):
            raise ValueError(f"contexts must be 'sampled', 'plain' or groups of templates, got {contexts!r}")
        self.layers = None if layers is None else tuple(layers)
        self.covariance_weight = covariance_weight
        self.residual = residual
        self.target = target
        self.keys = keys
        self.contexts = contexts if isinstance(contexts, str) else check_templates(contexts)
        if not 1 <= context_count <= len(STARTS):
            raise ValueError(f"context_count must be 1 to {len(STARTS)}, got {context_count}")
        self.context_count = context_count
        self.seed = seed
        self.ridge = ridge
        self.storage = storage
        self.transforms = tuple(transforms)
        self.norm_anchor = norm_anchor
        self._reference: float | None = None  # of norm_anchor, once it is known
        self.solvers: dict[int, Solver] = {}
        self.templates: Templates = ()
        self.targets: dict[str, tuple[str, Target]] = {}  # by id: what was asked for, and its target
        self.known: KeyIndex | None = None
        self._key_rows: KeyRows | None = None
        self._failed: dict[str, FloatingPointError] = {}  # what was asked for in the window and diverged

    # ---- before the stream --------------------------------------------------------------------------------------

    def resolve_layers(self, adapter: ModelAdapter) -> tuple[int, ...]:
        """Return the layers to edit, those of the model's preset when none were given."""
        layers = self.layers or edit_layers(adapter)
        for layer in layers:
            adapter.check_layer(layer)
        return layers

    def prepare(
        self,
        ledger: EditLedger,
        tokenizer: PreTrainedTokenizerBase,
        statistics: KeyStatistics | Mapping[int, Tensor],
        status: Status = silent,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Set contexts and solvers up.

        Args:
            ledger: Holds the model and its original weights.
            tokenizer: A fast tokenizer.
            statistics: How to get the second moments, or the moments themselves by layer.
            status: Receives a line about what is going on.
            progress: Called with tokens read and tokens in all.
        """
        check_tokenizer(tokenizer)
        self.ledger, self.tokenizer = ledger, tokenizer
        original = ledger.original()
        self.templates = self._make_templates(original)
        if isinstance(statistics, Mapping):
            moments = dict(statistics)
        else:
            status("key statistics")
            moments = statistics.compute(original, tokenizer, ledger.layers, progress)
        self.solvers = {}
        for layer in ledger.layers:
            self.solvers[layer] = self._make_solver(ledger.adapter, layer, moments)
        self.known = KeyIndex(ledger.adapter.shape(ledger.layers[0])[1])
        self.targets.clear()
        self._failed.clear()
        self._key_rows = None
        self._reference = None if self.norm_anchor is None else self.norm_anchor.reference

    def _make_solver(self, adapter: ModelAdapter, layer: int, moments: dict[int, Tensor]) -> Solver:
        """Make the solver of a layer of its second moment, which is taken out of ``moments``."""
        shape = adapter.shape(layer)

        def make() -> OwnSolver:
            moment = moments.pop(layer)
            if self.storage.offload == "none":
                moment = moment.to(algebra_device(adapter.device))
            return self._solver_of(for_algebra(self.storage.place(moment)), shape[0])

        return (
            SharedSolver(adapter.ranks, make, shape, self.memory, adapter.device) if adapter.ranks.together else make()
        )

    def _solver_of(self, moment: Tensor, d_out: int) -> OwnSolver:
        """Make a solver of a second moment ``(d_in, d_in)``, float64."""
        return RidgeSolver(self._prior_of(moment), d_out, memory=self.memory, storage=self.storage)

    def _prior_of(self, moment: Tensor) -> Tensor:
        r"""Return :math:`\lambda C`, with the ridge."""
        prior = self.covariance_weight * moment
        if self.ridge:
            prior.diagonal().add_(self.ridge * prior.diagonal().mean())
        return prior

    def settings(self) -> dict[str, Any]:
        """Return all settings that a result depends on, and what the second moments were."""
        target = asdict(self.target)
        return {
            **super().settings(),
            "layers": list(self.ledger.layers),
            "covariance_weight": self.covariance_weight,
            "ridge": self.ridge,
            "residual": self.residual,
            "keys": self.keys,
            **{f"target.{name}": value for name, value in target.items()},
            "contexts": self.contexts if isinstance(self.contexts, str) else [list(group) for group in self.contexts],
            "context_count": self.context_count,
            "seed": self.seed,
            "storage.inverse": self.storage.inverse,
            **({"transforms": [transform.settings() for transform in self.transforms]} if self.transforms else {}),
            **({} if self.norm_anchor is None else {"norm_anchor": asdict(self.norm_anchor)}),
            **self._own_settings(),
            "key statistics": [solver.prior_checksum for solver in self.solvers.values()],
        }

    def _own_settings(self) -> dict[str, Any]:
        """Return, as primitives, the settings that a method has beside those of the engine."""
        return {}

    def opening(self) -> dict[str, Any]:
        """Return the sampled contexts, and the length that norm-anchor scaling gives to what is written."""
        anchored = {} if self.norm_anchor is None else {"reference": self._anchor_length(self.norm_anchor, silent)}
        return {"templates": [list(group) for group in self.templates], **anchored}

    def reopen(self, opening: Mapping[str, Any]) -> None:
        """Go on with the contexts of an earlier process."""
        self.templates = check_templates(opening["templates"])
        self._reference = opening.get("reference")

    @property
    def exact_undo(self) -> bool:
        """Whether facts depend on no other edit: targets and keys are those of the original model."""
        layers = self.ledger.layers if self.solvers else self.layers or ()
        return self.on_original and self.memory and (self.keys == "base" or len(layers) == 1)

    def _make_templates(self, original: ModelAdapter) -> Templates:
        if self.contexts == "plain":
            return (("{}",),)
        if self.contexts == "sampled":
            sampled = sample_templates(original, self.tokenizer, self.seed, STARTS[: self.context_count])
            return check_templates(original.ranks.agree([list(group) for group in sampled]))
        return check_templates(self.contexts)

    # ---- one step -----------------------------------------------------------------------------------------------

    def propose(
        self,
        requests: Sequence[EditRequest],
        window: Sequence[EditRequest] = (),
        status: Status = silent,
        replaced: Sequence[RecordedFacts] = (),
    ) -> Proposal:
        """Work out the updates for some requests; see :meth:`Editor.propose`."""
        if self.one_by_one and len(requests) > 1:
            raise ArgumentError(
                f"{type(self).__name__} makes one edit at a time, got a step of {len(requests)}: set "
                "data.batch_size to 1, or use a batch method (EMMET, MEMIT)"
            )
        watch = Stopwatch()
        trial = Trial(self.solvers)
        with watch("solve"):
            trial.remove(self._read(replaced))
        model = self._model(trial, edited=bool(replaced))
        with watch("targets"):
            targets = self._get_targets(requests, window, model, status)
        columns = as_columns([t.value for t in targets]), as_columns([t.delta for t in targets])
        with self.ledger.adapter.fast_products():
            with watch("keys"):
                rows = self._get_key_rows(requests, window)
            facts = self._find(rows, [asked(r) for r in requests], *columns, model, trial, watch)
        entries = tuple(
            LedgerEntry(r.id, r.subject, r.text, r.target_new, _facts(t), r.as_dict())
            for r, t in zip(requests, targets, strict=True)
        )
        numbers = tuple(number for recorded in replaced for number in recorded.numbers)
        change = Change(removed=numbers, tensors=facts.as_tensors())
        return self._proposal(trial, change, facts, entries, tuple(requests), watch.seconds)

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
        walk = Walk(self.ledger, model, self.residual, self.templates, watch)
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
        """Return what a layer's solution is to say to some keys.

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

    def _written(self, layer: int, delta: Tensor) -> Tensor:
        """Return what is written for a layer's solution."""
        if not self.transforms:
            return delta
        base = for_algebra(self.ledger.base[self.ledger.names[layer]])
        return transformed(delta, self.ledger.adapter.to_layout(layer, base).to(delta), self.transforms)

    def _model(self, trial: Trial, edited: bool) -> ModelAdapter:
        """Return the model that targets and keys are measured on."""
        if self.on_original:
            return self.ledger.original()
        if not edited:
            return self.ledger.adapter
        weights = {
            self.ledger.names[n]: self.ledger.edited_weight(n, self._written(n, delta))
            for n, delta in trial.deltas().items()
        }
        return self.ledger.adapter.with_weights(weights)

    def _proposal(
        self,
        trial: Trial,
        change: Change,
        facts: Facts | None,
        entries: tuple[LedgerEntry, ...] = (),
        requests: tuple[EditRequest, ...] = (),
        seconds: Mapping[str, float] | None = None,
    ) -> Proposal:
        if not entries and not change.restored and {e.number for e in self.ledger.entries} <= set(change.removed):
            trial.clear()
        names = self.ledger.names
        updates = tuple(
            LayerUpdate(layer, names[layer], self._written(layer, delta)) for layer, delta in trial.deltas().items()
        )
        first = self.ledger.layers[0]
        keys = facts.keys[first] if facts is not None else self.solvers[first].delta.new_empty(0, 0)
        return Proposal(requests, updates, entries, _Pending(trial.steps, keys), seconds or {}, change)

    def accept(self, proposal: Proposal) -> None:
        """Take the solved facts into the solvers."""
        pending, change = proposal.pending, proposal.change
        for layer, steps in pending.steps.items():
            for step in steps:
                self.solvers[layer].absorb(step)
        if self.known is not None:
            self.known.remove([*change.removed, *change.rewritten])
            self.known.add([*(e.number for e in proposal.entries), *change.rewritten, *change.restored], pending.keys)
        for entry in proposal.entries:
            self.targets.pop(entry.id, None)

    def similar(self, requests: Sequence[EditRequest], window: Sequence[EditRequest]) -> list[list[tuple[int, float]]]:
        """Return, per request, the edits with the nearest keys at the first edited layer, and the cosines."""
        if self.known is None or not self.known.numbers:
            return [[] for _ in requests]
        walk = Walk(self.ledger, self.ledger.original(), self.residual, self.templates, Stopwatch())
        with self.ledger.adapter.fast_products():
            rows = self._get_key_rows(requests, window)
            keys = walk.first_keys(rows.of([asked(r) for r in requests]))
        found = [self.known.nearest(keys[:, column]) for column in range(len(requests))]
        return [[(number, cosine) for number, cosine in row] for row in self.ledger.adapter.ranks.agree(found)]

    # ---- targets ------------------------------------------------------------------------------------------------

    def _get_targets(
        self, requests: Sequence[EditRequest], window: Sequence[EditRequest], model: ModelAdapter, status: Status
    ) -> list[Target]:
        if not self.on_original:
            return self._optimise(requests, model, status)
        if any(asked(r) not in self._failed and self.targets.get(r.id, ("",))[0] != asked(r) for r in requests):
            group = list(window if all(r in window for r in requests) else requests)
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
        for request in requests:
            if asked(request) in self._failed:
                raise self._failed[asked(request)]
        return [self.targets[r.id][1] for r in requests]

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
        """Return a target whose written part has the reference length; see :mod:`lit_edit.editors.norm_anchor`."""
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
        """Return contexts, solver states (the solvers' own tensors), and targets that are fitted but not yet used."""
        return {
            "targets": {name: {"asked": asked, **target.as_state()} for name, (asked, target) in self.targets.items()},
            "templates": [list(group) for group in self.templates],
            "solvers": {str(layer): solver.state_dict(copy=False) for layer, solver in self.solvers.items()},
            "known": None if self.known is None else self.known.state_dict(),
        }

    def check_state(self, state: Mapping[str, Any], layers: Sequence[int]) -> None:
        """Raise :class:`ArgumentError` if a saved state is of other layers or of an editor with another memory."""
        saved = state.get("solvers", {})
        if set(saved) != {str(layer) for layer in layers}:
            raise ArgumentError(
                f"the checkpoint edits layers {sorted(map(int, saved))}, this editor {sorted(layers)}; use the config "
                "that the checkpoint was made with"
            )
        if any(bool(solver.get("memory")) != self.memory for solver in saved.values()):
            raise ArgumentError(
                "the checkpoint was made by another editing method; use the config that it was made with"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore contexts and solver states on a prepared editor.

        Raises:
            ValueError: If the state is of other layers or another kind of editor.
        """
        if set(state["solvers"]) != {str(layer) for layer in self.solvers}:
            raise ValueError(
                f"the checkpoint edits layers {sorted(map(int, state['solvers']))}, this editor {sorted(self.solvers)}"
            )
        self.templates = check_templates(state["templates"])
        for layer, solver in self.solvers.items():
            solver.load_state_dict(state["solvers"][str(layer)])
        if self.known is not None and state.get("known") is not None:
            self.known.load_state_dict(state["known"])
        self.targets = {name: (saved["asked"], Target.from_state(saved)) for name, saved in state["targets"].items()}
        self._key_rows = None


class _TargetDivergedError(FloatingPointError):
    """The target of one edit left the finite numbers."""

    def __init__(self, id: str, message: str) -> None:
        super().__init__(message)
        self.id = id


def _facts(target: Target) -> dict[str, float]:
    return {
        "target_probability_before": target.probability_before,
        "target_probability": target.probability,
        "target_loss": target.trace[-1][0],
        "target_steps": float(len(target.trace)),
        "residual_norm": float(target.delta.norm()),
        "state_norm": float(target.base.norm()),
    }
