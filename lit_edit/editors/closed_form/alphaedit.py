"""AlphaEdit: sequential MEMIT in the null space of what the model knows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_edit.editors.closed_form.engine import ClosedFormEditor
from lit_edit.editors.closed_form.memit import MEMITSeq
from lit_edit.errors import ArgumentError, check_positive
from lit_edit.files.checksum import checksum
from lit_edit.solvers.shared import OwnSolver
from lit_edit.solvers.subspace import SubspaceSolver


def null_space(moment: Tensor, explained: float, threshold: float | None = None) -> Tensor:
    """Return a basis ``(d_in, p)`` of the directions that ordinary keys hardly have, in orthonormal columns.

    Args:
        moment: ``(d_in, d_in)``, the second moment of the keys.
        explained: Share of the moment's trace that the other directions, which are to be preserved, hold at least.
        threshold: In its place, as published: directions with an eigenvalue below this. It is not scale-free.

    Raises:
        ArgumentError: If there is no such direction.

    Example:
        >>> null_space(torch.diag(torch.tensor([0.1, 8.0, 2.0], dtype=torch.float64)), explained=0.9).abs().tolist()
        [[1.0], [0.0], [0.0]]
    """
    values, vectors = torch.linalg.eigh(moment)  # ascending
    if threshold is not None:
        count = int((values < threshold).sum())
    else:
        largest = values.clamp(min=0).flip(0).cumsum(0)
        preserved = int((largest < explained * largest[-1]).sum()) + 1
        count = len(values) - preserved
    if count <= 0:
        what = f"threshold {threshold}" if threshold is not None else f"explained {explained}"
        raise ArgumentError(
            f"no direction of the keys is left to edit in at {what} (eigenvalues {float(values[0]):.2e} to "
            f"{float(values[-1]):.2e}): lower explained, or raise threshold"
        )
    return vectors[:, :count].contiguous()


class AlphaEdit(ClosedFormEditor):
    r"""Null-space constrained sequential editing (AlphaEdit, arXiv 2410.02355, eq. 14).

    :math:`\Delta = R K^\top P\,(K_p K_p^\top P + K K^\top P + \lambda I)^{-1}` on the current weights, where :math:`P`
    projects on the directions that ordinary text hardly uses and :math:`K_p` are the keys of earlier edits: neither
    what the model knows nor what was edited before is to change. Solved in coordinates of the null space, where the
    system is symmetric (:class:`lit_edit.solvers.subspace.SubspaceSolver`).

    The published null space is all eigenvectors of :math:`C` with an eigenvalue below 0.02, a number that fits some
    models and none of another scale; the default here is by explained energy.

    Args:
        weight: :math:`\lambda` (``L2`` in the released code, 10 there, 1 for Llama-3 in EasyEdit).
        explained: Share of the energy of ordinary keys that stays untouched.
        threshold: The published absolute threshold on eigenvalues instead.
        kwargs: As for :class:`~lit_edit.editors.closed_form.engine.ClosedFormEditor`.
    """

    about = replace(
        MEMITSeq.about,
        title="AlphaEdit",
        paper="AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models, arXiv 2410.02355",
        cost="target optimisation; p^2 + d_in d_out per layer (p: dimension of the null space); once d_in^3",
        state="3 p^2 + p d_in + d_in d_out per layer, whatever the number of edits",
    )
    on_original = False
    memory = True
    depends_on = "weight explained threshold"

    def __init__(
        self, weight: float = 10.0, explained: float = 0.98, threshold: float | None = None, **kwargs: Any
    ) -> None:
        check_positive(**{"weight (L2)": weight}, threshold=1.0 if threshold is None else threshold)
        if not 0 < explained < 1:
            raise ValueError(f"explained must be between 0 and 1, got {explained}")
        super().__init__(covariance_weight=1.0, ridge=0.0, **kwargs)
        self.weight, self.explained, self.threshold = weight, explained, threshold

    def _solver_of(self, moment: Tensor, d_out: int) -> OwnSolver:
        basis = null_space(moment, self.explained, self.threshold)
        return SubspaceSolver(basis, self.weight, d_out, self.storage, origin=checksum(moment))
