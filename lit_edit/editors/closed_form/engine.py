"""The engine of the closed-form editors: targets, one walk for the keys, one solve per layer.

D4S, sequential MEMIT and their relatives are settings of it: on which weights targets and residuals are measured, how
the residual is spread over the layers, and whether earlier facts are remembered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from torch import Tensor

from lit_edit.devices.algebra import algebra_device, for_algebra
from lit_edit.editors.base import Moments, Proposal, Status, Step, entry_of
from lit_edit.editors.closed_form.located import asked, told
from lit_edit.editors.closed_form.reversible import KeyMode, ReversibleEditor
from lit_edit.editors.closed_form.trial import Trial
from lit_edit.editors.closed_form.walk import ResidualMode, as_columns
from lit_edit.errors import ArgumentError, check_not_negative, check_one_of, check_positive
from lit_edit.models.adapter import ModelAdapter
from lit_edit.solvers.recursive_least_squares import RidgeSolver
from lit_edit.solvers.shared import OwnSolver, SharedSolver, Solver
from lit_edit.solvers.storage import SolverStorage


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
        keys: Where keys are read: ``walked`` reads each layer's with all that has been written into the layers below
            (MEMIT, the released D4S); ``base`` reads them, and measures residuals, as if the edit were the only one
            ever made. Facts then depend on no other edit: the order does not matter, and undo is exact.
        ridge: Added to the diagonal of the second moment, relative to its mean.
        storage: Type and place of the solver's matrices, for layers too large for the memory at hand.
        kwargs: As for :class:`~lit_edit.editors.closed_form.located.LocatedEditor`.
    """

    depends_on = "covariance_weight ridge residual keys"

    def __init__(
        self,
        layers: Sequence[int] | None = None,
        covariance_weight: float = 200.0,
        residual: ResidualMode = "remeasured",
        keys: KeyMode = "walked",
        ridge: float = 0.0,
        storage: SolverStorage = SolverStorage(),  # noqa: B008 - frozen
        **kwargs: Any,
    ) -> None:
        check_positive(**{"covariance_weight (lambda)": covariance_weight})
        if residual not in get_args(ResidualMode):
            raise ValueError(f"residual must be one of {', '.join(get_args(ResidualMode))}, got {residual!r}")
        check_one_of(get_args(KeyMode), keys=keys)
        if keys == "base" and not self.on_original:
            raise ValueError(f"keys='base' reads the original model, {type(self).__name__} measures on the current one")
        check_not_negative(ridge=ridge)
        super().__init__(layers=layers, **kwargs)
        self.covariance_weight = covariance_weight
        self.residual, self.keys = residual, keys
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

    # ---- one step -----------------------------------------------------------------------------------------------

    def _work_out(self, step: Step) -> Proposal:
        if self.one_by_one and len(step.requests) > 1:
            raise ArgumentError(
                f"{type(self).__name__} makes one edit at a time, got a step of {len(step.requests)}: set "
                "data.batch_size to 1, or use a batch method (EMMET, MEMIT)"
            )
        trial = Trial(self.solvers)
        with step.watch("solve"):
            trial.remove(self._read(step.replaced))
        model = self._model(trial, edited=bool(step.replaced))
        with step.watch("targets"):
            targets = self._get_targets(step, model)
        columns = as_columns([t.value for t in targets]), as_columns([t.delta for t in targets])
        with self.ledger.adapter.fast_products():
            with step.watch("keys"):
                rows = self._get_key_rows(step.requests, step.window)
            facts = self._find(rows, [asked(r) for r in step.requests], *columns, model, trial, step.watch)
        entries = tuple(map(entry_of, step.requests, map(told, targets)))
        return self._proposal(trial, step.change(facts.as_tensors()), facts, entries)

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
        """Restore contexts and solvers on a prepared editor; a :class:`ValueError` if they are another editor's."""
        if set(state["solvers"]) != {str(layer) for layer in self.solvers}:
            raise ValueError(
                f"the checkpoint edits layers {sorted(map(int, state['solvers']))}, this editor {sorted(self.solvers)}"
            )
        for layer, solver in self.solvers.items():
            solver.load_state_dict(state["solvers"][str(layer)])
        super().load_state_dict(state)
