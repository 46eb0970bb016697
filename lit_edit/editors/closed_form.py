"""The engine of the closed-form editors: targets, one walk for the keys, one solve per layer.

D4S, sequential MEMIT and their relatives are settings of it: on which weights targets and residuals are measured, how
the residual is spread over the layers, and whether earlier facts are remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lit_edit.data.request import EditRequest
from lit_edit.editors.base import Editor, Proposal, Status, Stopwatch, silent
from lit_edit.editors.key_rows import KeyLine, KeyRows
from lit_edit.errors import ArgumentError
from lit_edit.ledger import EditLedger, LayerUpdate, LedgerEntry
from lit_edit.models.presets import edit_layers
from lit_edit.solvers.ridge import RidgeSolver, RidgeStep
from lit_edit.solvers.storage import SolverStorage
from lit_edit.targets.contexts import STARTS, Templates, check_templates, group_weights, sample_templates
from lit_edit.targets.optimize import DivergedError, Target, TargetSettings, optimise_targets
from lit_edit.targets.problem import build_problem
from lit_edit.tokens import check_tokenizer, pad_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lit_edit.models.adapter import ModelAdapter
    from lit_edit.stats.second_moment import KeyStatistics

DEFAULT_TARGET = TargetSettings(probability=0.95)
"""The published settings, but an edit stops once its target is said everywhere with this probability: going on until
the loss is 0.05 writes more and costs locality (measured: docs/settings.md)."""

ResidualMode = Literal["shared", "remeasured", "uniform"]
Contexts = Literal["sampled", "plain"]


@dataclass(frozen=True)
class _Pending:
    steps: dict[int, RidgeStep]


class ClosedFormEditor(Editor):
    r"""Locate, fit a target, and solve least squares in the MLP down projections of some layers.

    Args:
        layers: Layers to edit, ascending; by default those published for the model's family and size.
        covariance_weight: :math:`\lambda`, how much a key of ordinary text weighs against one of an edit.
        residual: How the residual :math:`r` is spread over the :math:`n` layers: ``remeasured`` measures it again after
            each layer and writes ``1/(remaining layers)`` of what is left (MEMIT); ``shared`` measures once and still
            divides by the remaining layers (the released D4S code, which writes 2.28 times the residual over five
            layers); ``uniform`` writes :math:`r/n` everywhere.
        target: Settings of the target optimisation.
        contexts: ``sampled`` (short texts by the unedited model, as published), ``plain`` (none), or the groups of
            templates themselves.
        context_count: How many texts to sample, one to five; the time of an edit goes with it.
        seed: Seeds the sampled contexts.
        ridge: Added to the diagonal of the second moment, relative to its mean.
        storage: Type and place of the solver's matrices, for layers too large for the memory at hand.

    Attributes:
        on_original: Targets and residuals are measured on the original weights (else on the current ones).
        memory: Earlier facts stay in the least-squares problem.
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
        contexts: Contexts | list[list[str]] = "sampled",
        context_count: int = 5,
        seed: int = 0,
        ridge: float = 0.0,
        storage: SolverStorage = SolverStorage(),  # noqa: B008 - frozen
    ) -> None:
        if layers is not None and (len(layers) == 0 or list(layers) != sorted(set(layers)) or min(layers) < 0):
            raise ValueError(f"layers must be ascending, different and not negative, got {list(layers)}")
        if not 0 < covariance_weight < float("inf"):
            raise ValueError(f"covariance_weight (lambda) must be positive and finite, got {covariance_weight}")
        if residual not in ("shared", "remeasured", "uniform"):
            raise ValueError(f"residual must be 'shared', 'remeasured' or 'uniform', got {residual!r}")
        if not ridge >= 0:
            raise ValueError(f"ridge must not be negative, got {ridge}")
        if isinstance(contexts, str) and contexts not in ("sampled", "plain"):
            raise ValueError(f"contexts must be 'sampled', 'plain' or groups of templates, got {contexts!r}")
        self.layers = None if layers is None else tuple(layers)
        self.covariance_weight = covariance_weight
        self.residual = residual
        self.target = target
        self.contexts = contexts if isinstance(contexts, str) else check_templates(contexts)
        if not 1 <= context_count <= len(STARTS):
            raise ValueError(f"context_count must be 1 to {len(STARTS)}, got {context_count}")
        self.context_count = context_count
        self.seed = seed
        self.ridge = ridge
        self.storage = storage
        self.solvers: dict[int, RidgeSolver] = {}
        self.templates: Templates = ()
        self.targets: dict[str, tuple[str, Target]] = {}  # by id: what was asked for, and its target
        self._key_rows: KeyRows | None = None

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
            prior = self.covariance_weight * self.storage.place(moments.pop(layer)).double()
            if self.ridge:
                prior.diagonal().add_(self.ridge * prior.diagonal().mean())
            d_out = ledger.adapter.shape(layer)[0]
            self.solvers[layer] = RidgeSolver(prior, d_out, memory=self.memory, storage=self.storage)
        self.targets.clear()
        self._key_rows = None

    def _make_templates(self, original: ModelAdapter) -> Templates:
        if self.contexts == "plain":
            return (("{}",),)
        if self.contexts == "sampled":
            return sample_templates(original, self.tokenizer, self.seed, STARTS[: self.context_count])
        return check_templates(self.contexts)

    # ---- one step -----------------------------------------------------------------------------------------------

    def propose(
        self, requests: Sequence[EditRequest], window: Sequence[EditRequest] = (), status: Status = silent
    ) -> Proposal:
        """Work out the updates for some requests; see :meth:`Editor.propose`."""
        watch = Stopwatch()
        with watch("targets"):
            targets = self._get_targets(requests, window, status)
        with self.ledger.adapter.fast_products():
            with watch("keys"):
                rows = self._get_key_rows(requests, window)
            steps = self._walk(rows, targets, watch)
        updates = tuple(LayerUpdate(layer, self.ledger.names[layer], step.delta) for layer, step in steps.items())
        entries = tuple(
            LedgerEntry(r.id, r.subject, r.text, r.target_new, _facts(t))
            for r, t in zip(requests, targets, strict=True)
        )
        return Proposal(tuple(requests), updates, entries, _Pending(steps), watch.seconds)

    def accept(self, proposal: Proposal) -> None:
        """Take the solved facts into the solvers."""
        for layer, step in proposal.pending.steps.items():
            self.solvers[layer].absorb(step)
        for request in proposal.requests:
            self.targets.pop(request.id, None)

    def _get_targets(
        self, requests: Sequence[EditRequest], window: Sequence[EditRequest], status: Status
    ) -> list[Target]:
        if not self.on_original:
            return self._optimise(requests, self.ledger.adapter, status)
        if any(r.id not in self.targets or self.targets[r.id][0] != _asked(r) for r in requests):
            group = window if all(r in window for r in requests) else requests
            made = self._optimise(group, self.ledger.original(), status)
            self.targets = {r.id: (_asked(r), target) for r, target in zip(group, made, strict=True)}
        return [self.targets[r.id][1] for r in requests]

    def _optimise(self, requests: Sequence[EditRequest], adapter: ModelAdapter, status: Status) -> list[Target]:
        problems = [build_problem(self.tokenizer, r, self.templates) for r in requests]
        what = repr(requests[0].subject) if len(requests) == 1 else f"{len(requests)} edits"
        try:
            return optimise_targets(
                adapter,
                problems,
                self.ledger.layers[-1],
                self.target,
                pad_token(self.tokenizer),
                lambda step, steps: status(f"fitting targets of {what}: step {step + 1}/{steps}"),
            )
        except DivergedError as error:
            request = requests[error.index]
            raise FloatingPointError(
                f"the target of edit {request.id!r} ({request.text!r} -> {request.target_new!r}) diverged at step "
                f"{error.step}; nothing of it was written. Use a smaller learning rate "
                f"(model.editor.init_args.target.lr, now {self.target.lr})"
            ) from None

    @torch.no_grad()
    def _walk(self, rows: KeyLine, targets: Sequence[Target], watch: Stopwatch) -> dict[int, RidgeStep]:
        """Walk up the edited layers: read keys, solve, go on with the new weight."""
        layers = self.ledger.layers
        reference = self.ledger.original() if self.on_original else self.ledger.adapter
        hidden, steps = rows.hidden, {}
        weights = torch.tensor(group_weights(self.templates), dtype=torch.float64, device=hidden.device)
        wanted = torch.stack([target.value for target in targets], 1).to(hidden.device)  # (d_out, n)
        missing = torch.stack([target.delta for target in targets], 1).to(hidden.device)
        for index, layer in enumerate(layers):
            with watch("keys"):
                found: dict[int, Tensor] = {}
                after = rows.line.run(hidden, layer, layer + 1, keys=found, adapter=reference)
                keys = found[layer]
                key = torch.einsum("ncd,c->dn", keys[rows.lookups].double(), weights)
                if self.residual == "remeasured" and index > 0:
                    plain = rows.line.carry(after, rows.plain)
                    reached = rows.plain.run(plain, layer + 1, layers[-1] + 1, adapter=reference)
                    missing = wanted - reached[rows.plain_lookups].T.to(wanted)
            with watch("solve"):
                share = len(layers) if self.residual == "uniform" else len(layers) - index
                residual = reference.to_weight_residual(layer, keys[rows.lookups[:, 0]], missing.double() / share)
                step = self.solvers[layer].preview(key, residual)
                steps[layer] = step
                weight = self.ledger.edited_weight(layer, step.delta)
            if layer != layers[-1]:
                with watch("keys"):
                    hidden = self._rewritten(reference, layer, weight, hidden, after, keys, rows)
        return steps

    def _rewritten(
        self,
        reference: ModelAdapter,
        layer: int,
        weight: Tensor,
        hidden: Tensor,
        after: Tensor,
        keys: Tensor,
        rows: KeyLine,
    ) -> Tensor:
        """Return a layer's output once its down projection has another weight.

        Args:
            reference: The model whose layer has run.
            layer: Which.
            weight: The new weight, in the layer's layout.
            hidden: ``(tokens, d_model)``, the layer's input.
            after: Its output so far.
            keys: ``(tokens, d_in)``, the inputs of the down projection.
            rows: The tokens.
        """
        if reference.spec.output_norm is not None:  # what is projected does not simply add to the stream
            view = reference.with_weights({self.ledger.names[layer]: weight})
            return rows.line.run(hidden, layer, layer + 1, adapter=view)
        change = reference.to_layout(layer, weight - reference.weight(layer))  # (d_out, d_in)
        return after + keys @ change.T

    def _get_key_rows(self, requests: Sequence[EditRequest], window: Sequence[EditRequest]) -> KeyLine:
        ids = [_asked(r) for r in requests]
        if self._key_rows is None or not self._key_rows.holds(ids):
            # The same rows together whatever was done before: a resumed run computes the very same batch.
            group = window if all(r in window for r in requests) else requests
            problems = {_asked(r): build_problem(self.tokenizer, r, self.templates) for r in group}
            self._key_rows = KeyRows(self.ledger.adapter, problems, self.ledger.layers[0], pad_token(self.tokenizer))
        return self._key_rows.of(ids)

    # ---- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return contexts, solver states (the solvers' own tensors), and targets that are fitted but not yet used."""
        return {
            "targets": {name: {"asked": asked, **target.as_state()} for name, (asked, target) in self.targets.items()},
            "templates": [list(group) for group in self.templates],
            "solvers": {str(layer): solver.state_dict(copy=False) for layer, solver in self.solvers.items()},
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
        self.targets = {name: (saved["asked"], Target.from_state(saved)) for name, saved in state["targets"].items()}
        self._key_rows = None


def _asked(request: EditRequest) -> str:
    """Tell requests apart by all that their targets depend on."""
    return "\x1f".join((request.id, request.prompt, request.subject, request.target_new))


def _facts(target: Target) -> dict[str, float]:
    return {
        "target_probability_before": target.probability_before,
        "target_probability": target.probability,
        "target_loss": target.trace[-1][0],
        "target_steps": float(len(target.trace)),
        "residual_norm": float(target.delta.norm()),
        "state_norm": float(target.base.norm()),
    }
