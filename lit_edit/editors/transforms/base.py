"""What can be done to an update before it is written, whichever method has made it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

import torch
from torch import Tensor

from lit_edit.solvers.functional import FactsError


class UpdateTransform(ABC):
    """A function of a layer's whole update and its original weight.

    It is applied to the update relative to the original weights, each time anew: editors keep what they have solved,
    and what is written is made of that. So it composes with undo and resume, and applying it at every edit is the same
    as applying it once at the end.
    """

    @abstractmethod
    def __call__(self, delta: Tensor, base: Tensor) -> Tensor:
        """Return what is to be written in place of an update.

        Args:
            delta: ``(d_out, d_in)``, the whole update; not to be changed.
            base: ``(d_out, d_in)``, the original weight, in the update's type.

        Returns:
            ``(d_out, d_in)``.
        """

    def settings(self) -> dict[str, Any]:
        """Return, as primitives, what the result depends on."""
        own = asdict(self) if is_dataclass(self) and not isinstance(self, type) else dict(vars(self))
        return {"transform": type(self).__name__, **own}


def transformed(delta: Tensor, base: Tensor, transforms: Sequence[UpdateTransform]) -> Tensor:
    """Apply transforms one after another."""
    for transform in transforms:
        delta = transform(delta, base)
    return delta


def check_update(delta: Tensor, base: Tensor) -> None:
    """Check an update ``(d_out, d_in)`` and the weight that it is for.

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
