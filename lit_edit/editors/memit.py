"""MEMIT, batch by batch."""

from __future__ import annotations

from lit_edit.editors.closed_form import ClosedFormEditor


class MEMIT(ClosedFormEditor):
    r"""Mass editing, applied sequentially without memory (MEMIT, arXiv 2210.07229, eq. 14).

    Each step solves :math:`\Delta = R K^\top (\lambda C + K K^\top)^{-1}` on the current weights and adds it. One step
    with all requests is the published batch method; many steps forget: earlier keys are not part of later problems.
    """

    on_original = False
    memory = False
