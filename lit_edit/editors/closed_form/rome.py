"""ROME and its repair: one layer, one fact, held exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from lit_edit.devices.algebra import for_algebra
from lit_edit.editors.base import EditorInfo
from lit_edit.editors.closed_form.engine import ClosedFormEditor
from lit_edit.models.adapter import ModelAdapter
from lit_edit.solvers.recursive_least_squares import RidgeSolver
from lit_edit.solvers.shared import OwnSolver, Solver
from lit_edit.targets.contexts import Templates
from lit_edit.targets.optimize import TargetSettings

_TARGET = TargetSettings(anchor="mlp", probability=0.95)


class ROME(ClosedFormEditor):
    r"""Rank-one model editing (ROME, arXiv 2202.05262, eq. 2), as published, one edit after another.

    :math:`\Delta = r\,u^\top / (k_p^\top u)` with :math:`u = C^{-1} k_*`: the least change, measured by :math:`C`, that
    makes one layer say :math:`v_*` to the key. As in the released code :math:`k_*` is the mean over contexts, but the
    denominator and the residual are those of the plain prompt's key :math:`k_p`. Where :math:`k_p^\top u` is small the
    change is huge: a single edit may break the model, typically one whose subject stands at the very beginning.
    :class:`RROME` has one key everywhere.

    Args:
        layers: The one layer to edit; by default the one published for the model.
        target: Settings of the target optimisation; its vector is measured against the output of the MLP.
        kwargs: As for :class:`~lit_edit.editors.closed_form.engine.ClosedFormEditor`. Contexts have equal weights.
    """

    about = EditorInfo(
        title="ROME",
        paper="Locating and Editing Factual Associations in GPT, arXiv 2202.05262",
        kind="closed form",
        cost="target optimisation; d_in^2 + d_in d_out",
        state="d_in^2, constant",
        batch=False,
        undo="approximate",
        lora=True,
        devices=True,
        lacks="made for a single edit: keys of earlier ones are not known, and some subjects break the model at once",
    )
    on_original = False
    memory = False
    single_layer = True

    def __init__(self, layers: list[int] | None = None, target: TargetSettings = _TARGET, **kwargs: Any) -> None:
        if layers is not None and len(layers) != 1:
            raise ValueError(f"layers must be one layer, got {layers}: {type(self).__name__} edits a single one")
        super().__init__(layers=layers, target=target, covariance_weight=1.0, residual="remeasured", **kwargs)

    def _solver_of(self, moment: Tensor, d_out: int) -> OwnSolver:
        return RidgeSolver(self._prior_of(moment), d_out, memory=False, storage=self.storage, slack=0.0)

    def _make_templates(self, original: ModelAdapter) -> Templates:
        return (tuple(template for group in super()._make_templates(original) for template in group),)

    def _residuals(
        self, layer: int, keys: Tensor, plain: Tensor, missing: Tensor, solver: Solver, model: ModelAdapter
    ) -> Tensor:
        """Return residuals with which the symmetric solution is the published one: times ``k*ᵀu / k_pᵀu``."""
        projected, _ = solver.alone(keys)  # where the solver is: in host memory, perhaps
        return missing * ((keys.to(projected) * projected).sum(0) / (plain.to(projected) * projected).sum(0)).to(
            missing
        )


class RROME(ROME):
    r"""ROME with one key everywhere (R-ROME, arXiv 2403.07175; C-ROME, arXiv 2406.11263).

    :math:`\Delta = (v_* - W k_*)\,u^\top / (k_*^\top u)` with the mean key over contexts in all three places, and
    :math:`v_* = W k_p + \delta`. :math:`k_*^\top C^{-1} k_*` is never near zero, so no single edit explodes. Both
    papers found this; their code is the same in this respect.
    """

    about = replace(
        ROME.about,
        title="R-ROME / C-ROME",
        paper="Rebuilding ROME, arXiv 2403.07175; The Fall of ROME, arXiv 2406.11263",
        lacks="made for a single edit: keys of earlier ones are not known",
    )

    def _residuals(
        self, layer: int, keys: Tensor, plain: Tensor, missing: Tensor, solver: Solver, model: ModelAdapter
    ) -> Tensor:
        weight = for_algebra(model.to_layout(layer, model.weight(layer)))
        return missing + weight @ (plain - keys)
