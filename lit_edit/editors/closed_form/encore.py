"""ENCORE: sequential MEMIT with a norm constraint and an early stop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lit_edit.editors.closed_form.memit import MEMITSeq
from lit_edit.targets.optimize import TargetSettings

_TARGET = TargetSettings(first_choice=2)


class ENCORE(MEMITSeq):
    r"""MEMIT with memory, a Frobenius term, and targets that are not optimised too far (ENCORE, arXiv 2502.01636).

    The system of :class:`lit_edit.editors.MEMITSeq` with :math:`\beta I` (``frobenius``, 20 for Llama-3-8B) keeps the
    norm of the edited layers from growing; most-probable early stopping (``target.first_choice``, published 2) ends
    the target optimisation as soon as the target is the first choice in all contexts.

    Args:
        frobenius: :math:`\beta`.
        target: Settings of the target optimisation.
        kwargs: As for :class:`~lit_edit.editors.closed_form.engine.ClosedFormEditor`.
    """

    about = replace(
        MEMITSeq.about,
        title="ENCORE",
        paper="Lifelong Sequential Knowledge Editing without Model Degradation, arXiv 2502.01636",
    )

    def __init__(self, frobenius: float = 1.0, target: TargetSettings = _TARGET, **kwargs: Any) -> None:
        super().__init__(frobenius=frobenius, target=target, **kwargs)
