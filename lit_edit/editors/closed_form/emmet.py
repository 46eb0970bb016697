"""EMMET: many facts in one layer, held exactly."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_edit.editors.base import EditorInfo
from lit_edit.editors.closed_form.engine import ClosedFormEditor
from lit_edit.errors import check_not_negative
from lit_edit.solvers.recursive_least_squares import RidgeSolver
from lit_edit.solvers.shared import OwnSolver


class EMMET(ClosedFormEditor):
    r"""Equality-constrained mass editing (EMMET, arXiv 2403.14236, eq. 14).

    :math:`\Delta = R\,(K^\top (\lambda C)^{-1} K + e I)^{-1} K^\top (\lambda C)^{-1}`: of all changes that make the
    facts of a step hold the one that disturbs other keys least. With one fact it is ROME's formula with
    the mean key; MEMIT tends to it as :math:`\lambda \to 0`.

    Args:
        layers: Layers to edit; by default the one published for ROME on the model.
        slack: :math:`e`, in a step of several facts: their keys may be nearly dependent. A single fact holds exactly.
        kwargs: As for :class:`~lit_edit.editors.closed_form.engine.ClosedFormEditor`.
    """

    about = EditorInfo(
        title="EMMET",
        paper="A Unified Framework for Model Editing, arXiv 2403.14236",
        kind="closed form",
        cost="target optimisation; n d_in^2 + n^3 for n edits",
        state="d_in^2 per layer, constant",
        undo="approximate",
        lora=True,
        devices=True,
        lacks="a later step does not know the keys of an earlier one; facts with nearly the same key cannot both hold",
    )
    on_original = False
    memory = False
    single_layer = True
    depends_on = "slack"

    def __init__(self, layers: list[int] | None = None, slack: float = 0.1, **kwargs: Any) -> None:
        check_not_negative(slack=slack)
        super().__init__(layers=layers, **kwargs)
        self.slack = slack

    def _solver_of(self, moment: Tensor, d_out: int) -> OwnSolver:
        prior = self._prior_of(moment)
        return RidgeSolver(prior, d_out, memory=False, storage=self.storage, slack=self.slack, slack_alone=0.0)
