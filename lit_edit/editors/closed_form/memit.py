"""MEMIT, batch by batch, without and with memory of earlier keys."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_edit.editors.base import EditorInfo
from lit_edit.editors.closed_form.engine import ClosedFormEditor
from lit_edit.errors import check_not_negative

_PAPER = "Mass-Editing Memory in a Transformer, arXiv 2210.07229"


class MEMIT(ClosedFormEditor):
    r"""Mass editing, applied sequentially without memory (MEMIT, arXiv 2210.07229, eq. 14).

    Each step solves :math:`\Delta = R K^\top (\lambda C + K K^\top)^{-1}` on the current weights and adds it. One step
    with all requests is the published batch method; many steps forget: earlier keys are not part of later problems.
    """

    about = EditorInfo(
        title="MEMIT",
        paper=_PAPER,
        kind="closed form",
        cost="target optimisation; d_in^2 + d_in d_out per layer",
        state="d_in^2 per layer, constant",
        undo="approximate",
        lora=True,
        devices=True,
        lacks="made for one batch: a later step does not know the keys of an earlier one and overwrites them",
    )
    on_original = False
    memory = False


class MEMITSeq(ClosedFormEditor):
    r"""MEMIT that remembers the keys of earlier steps (MEMIT_seq of AlphaEdit's comparison, arXiv 2410.02355).

    Each step solves :math:`R K^\top (\lambda C + \beta I + K_p K_p^\top + K K^\top)^{-1}` on the current weights and
    adds it, :math:`K_p` being all earlier keys: what has been written there is to stay. (The released wrapper does not
    hand :math:`K_p` on and crashes.) Recursively it is least squares with the facts :math:`(k, W_{t-1} k - W_0 k + r)`.

    Args:
        frobenius: :math:`\beta`, how much a change of the weights weighs by itself.
        kwargs: As for :class:`~lit_edit.editors.closed_form.engine.ClosedFormEditor`.
    """

    about = EditorInfo(
        title="MEMIT with memory",
        paper=_PAPER,
        kind="closed form",
        cost="target optimisation; d_in^2 + d_in d_out per layer",
        state="2 d_in^2 + d_in d_out per layer, whatever the number of edits",
        undo="approximate",
        lora=True,
        devices=True,
        lacks="an edit of a fact that was edited before fights with what is remembered of it",
    )
    on_original = False
    memory = True
    depends_on = "frobenius"

    def __init__(self, frobenius: float = 0.0, **kwargs: Any) -> None:
        check_not_negative(frobenius=frobenius)
        super().__init__(**kwargs)
        self.frobenius = frobenius

    def _prior_of(self, moment: Tensor) -> Tensor:
        prior = super()._prior_of(moment)
        prior.diagonal().add_(self.frobenius)
        return prior
