"""What every transform of updates asks of its arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_edit.solvers.functional import FactsError


def check_update(delta: Tensor, base: Tensor) -> None:
    """Check an update and the weight that it is for.

    Args:
        delta: ``(d_out, d_in)``.
        base: ``(d_out, d_in)``.

    Raises:
        ValueError: If they are not two matrices of the same shape and the same floating type.
        FactsError: If the update holds NaN or infinite values: what is cut out of it would hide them from the ledger.
    """
    if delta.dim() != 2:
        raise ValueError(f"delta must be a matrix (d_out, d_in), got shape {tuple(delta.shape)}")
    if base.shape != delta.shape:
        raise ValueError(f"base must be of the shape of delta, {tuple(delta.shape)}, got {tuple(base.shape)}")
    if not delta.is_floating_point() or base.dtype != delta.dtype:
        raise ValueError(f"delta and base must be of one floating type, got {delta.dtype} and {base.dtype}")
    if not torch.isfinite(delta).all():
        raise FactsError("delta holds NaN or infinite values; the edit is refused and the weights stay as they are")
