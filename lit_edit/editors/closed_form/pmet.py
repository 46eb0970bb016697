"""PMET: targets for attention and MLP together, of which the MLP's are written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lit_edit.editors.closed_form.engine import ClosedFormEditor
from lit_edit.editors.closed_form.memit import MEMIT
from lit_edit.editors.closed_form.walk import ResidualMode
from lit_edit.errors import ArgumentError
from lit_edit.models.adapter import ModelAdapter
from lit_edit.targets.optimize import TargetSettings

_TARGET = TargetSettings(moved="modules", clamp=4.0, probability=0.95)


class PMET(ClosedFormEditor):
    r"""Precise model editing (PMET, arXiv 2308.08742, eq. 8 to 11).

    MEMIT with two vectors in the target optimisation, one added to the output of the attention and one to that of the
    MLP of the last edited layer: what the attention should say is not forced into the MLP. Only the MLP's is written,
    its residual is measured at the MLP's output, and a layer takes :math:`1/\sqrt{n}` of it where :math:`n` layers are
    left.

    The released code also weighs the likelihood by 0.1 once the target is the first choice and stops there at a small
    divergence; here ``target.probability`` and ``target.first_choice`` stop.

    Args:
        residual: How the residual is spread.
        target: Settings of the target optimisation.
        kwargs: As for :class:`~lit_edit.editors.closed_form.engine.ClosedFormEditor`.
    """

    about = replace(
        MEMIT.about,
        title="PMET",
        paper="PMET: Precise Model Editing in a Transformer, arXiv 2308.08742",
        cost="target optimisation from the last edited layer on; d_in^2 + d_in d_out per layer",
        lacks="made for one batch, as MEMIT is; not for models that normalise what the MLP says (Gemma)",
    )
    on_original = False
    memory = False
    measured = "mlp"

    def __init__(self, residual: ResidualMode = "root", target: TargetSettings = _TARGET, **kwargs: Any) -> None:
        super().__init__(residual=residual, target=target, **kwargs)

    def resolve_layers(self, adapter: ModelAdapter) -> tuple[int, ...]:
        """Return the layers to edit; refuse models whose MLP does not simply add to the stream."""
        if adapter.spec.output_norm is not None:
            raise ArgumentError(
                f"PMET is not for {adapter.spec.family!r}, which normalises what the MLP says: use MEMIT"
            )
        return super().resolve_layers(adapter)
