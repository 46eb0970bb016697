"""The engine of the closed-form editors: targets, one walk for the keys, one solve per layer.

D4S, sequential MEMIT and their relatives are settings of it: on which weights targets and residuals are measured, how
the residual is spread over the layers, and whether earlier facts are remembered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from lit_edit.data.request import EditRequest
from lit_edit.devices.algebra import algebra_device, for_algebra
from lit_edit.editors.base import Moments, Proposal, Status, Stopwatch, entry_of, numbers_of, silent
from lit_edit.editors.closed_form.facts import Facts, join_facts
from lit_edit.editors.closed_form.key_rows import KeyRows
from lit_edit.editors.closed_form.located import DEFAULT_TARGET, Contexts, told
from lit_edit.editors.closed_form.reversible import ReversibleEditor, asked
from lit_edit.editors.closed_form.trial import Trial, absorb
from lit_edit.editors.closed_form.walk import ResidualMode, Walk, alone, as_columns
from lit_edit.editors.transforms.base import UpdateTransform
from lit_edit.editors.transforms.norm_anchor import NormAnchor
from lit_edit.errors import ArgumentError, check_not_negative, check_one_of, check_positive
from lit_edit.ledger.edit_ledger import Change, LedgerEntry, RecordedFacts
from lit_edit.models.adapter import ModelAdapter
from lit_edit.solvers.recursive_least_squares import RidgeSolver, RidgeStep
from lit_edit.solvers.shared import OwnSolver, SharedSolver, Solver
from lit_edit.solvers.storage import SolverStorage
from lit_edit.targets.optimize import TargetSettings

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
        norm_anchor: Norm-anchor scaling of the targets (:class:`lit_edit.editors.NormAnchor`); by default none.

    Attributes:
        on_original: Targets and residuals are measured on the original weights (else on the current ones).
        memory: Earlier facts stay in the least-squares problem. On current weights they stay what they were made to be.
        targets: Targets that are fitted and not yet used, by the edit's id, with what they were fitted for.
    """

    memory: bool = True
    depends_on = "covariance_weight ridge residual keys"

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
        check_positive(**{"covariance_weight (lambda)": covariance_weight})
        if residual not in get_args(ResidualMode):
            raise ValueError(f"residual must be one of {', '.join(get_args(ResidualMode))}, got {residual!r}")
        check_one_of(get_args(KeyMode), keys=keys)
        if keys == "base" and not self.on_original:
            raise ValueError(f"keys='base' reads the original model, {type(self).__name__} measures on the current one")
        check_not_negative(ridge=ridge)
        super().__init__(layers, target, contexts, context_count, seed, transforms, norm_anchor)
        self.covariance_weight = covariance_weight
        self.residual = residual
        self.keys = keys
        self.ridge = ridge
        self.storage = storage
        self.solvers: dict[int, Solver] = {}

    # ---- before the stream --------------------------------------------------------------------------------------

    def _begin(self, moments: Moments, status: Status) -> None:
        """Set contexts and solvers up."""
        super()._begin(moments, status)
        known = moments()
        self.solvers = {layer: self._make_solver(self.ledger.adapter, layer, known) for layer in self.ledger.layers}

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
        moments = [solver.prior_checksum for solver in self.solvers.values()]
        return {**super().settings(), "storage.inverse": self.storage.inverse, "key statistics": moments}

    @property
    def exact_undo(self) -> bool:
        """Whether facts depend on no other edit: targets and keys are those of the original model."""
        layers = self.ledger.layers if self.solvers else self.layers or ()
        return self.on_original and self.memory and (self.keys == "base" or len(layers) == 1)

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
        entries = tuple(map(entry_of, requests, map(told, targets)))
        change = Change(removed=numbers_of(replaced), tensors=facts.as_tensors())
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

    def _model(self, trial: Trial, edited: bool) -> ModelAdapter:
        """Return the model that targets and keys are measured on."""
        if self.on_original:
            return self.ledger.original()
        if not edited:
            return self.ledger.adapter
        return self._view(trial.deltas())

    def _proposal(
        self,
        trial: Trial,
        change: Change,
        facts: Facts | None,
        entries: tuple[LedgerEntry, ...] = (),
        requests: tuple[EditRequest, ...] = (),
        seconds: Mapping[str, float] | None = None,
    ) -> Proposal:
        if self._leaves_nothing(change, entries):
            trial.clear()
        updates = self._updates({layer: self._written(layer, delta) for layer, delta in trial.deltas().items()})
        first = self.ledger.layers[0]
        keys = facts.keys[first] if facts is not None else self.solvers[first].delta.new_empty(0, 0)
        return Proposal(requests, updates, entries, _Pending(trial.steps, keys), seconds or {}, change)

    def accept(self, proposal: Proposal) -> None:
        """Take the solved facts into the solvers."""
        pending: _Pending = proposal.pending
        absorb(self.solvers, pending.steps)
        self._note(proposal, pending.keys)

    # ---- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return contexts, solver states (the solvers' own tensors), and targets that are fitted but not yet used."""
        solvers = {str(layer): solver.state_dict(copy=False) for layer, solver in self.solvers.items()}
        return {**super().state_dict(), "solvers": solvers}

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
        for layer, solver in self.solvers.items():
            solver.load_state_dict(state["solvers"][str(layer)])
        super().load_state_dict(state)
