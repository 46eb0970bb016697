"""RECT: of an update, only what changes the weights most, relative to their size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_edit.editors.transforms.base import UpdateTransform
from lit_edit.editors.transforms.update_checks import check_update


@dataclass(frozen=True)
class RECT(UpdateTransform):
    r"""Keeps the entries with the largest relative change and zeroes the rest (RECT, arXiv 2401.04700).

    The idea: an edit changes many entries a little, and those that it hardly changes do more harm than good. The paper
    keeps a fifth to two fifths; AlphaEdit's baseline, whose numbers most tables cite, keeps 0.4.

    What is written is no longer of low rank. Applied a second time it changes nothing.

    Args:
        keep: Share of the entries to keep, above 0; 1 keeps all.
        eps: Added to the size of each weight, so that weights of zero do not divide.
    """

    keep: float = 0.4
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _check(self.keep, self.eps)

    def __call__(self, delta: Tensor, base: Tensor) -> Tensor:
        """Return the update with its small entries zeroed; see :func:`keep_largest_relative`."""
        return keep_largest_relative(delta, base, self.keep, self.eps)


def keep_largest_relative(delta: Tensor, base: Tensor, keep: float = 0.4, eps: float = 1e-8) -> Tensor:
    r"""Zero all entries of an update but those with the largest :math:`|\Delta_{ij}| / (|W_{ij}| + \epsilon)`.

    Exactly ``round(keep * d_out * d_in)`` entries are kept, at least one. Of entries that change their weights equally,
    at the border, the first in the order of rows are kept: a threshold alone would keep all of them, or none.

    Args:
        delta: ``(d_out, d_in)``.
        base: ``(d_out, d_in)``, the original weight.
        keep: Share of the entries to keep, in (0, 1].
        eps: Added to the size of each weight.

    Returns:
        ``(d_out, d_in)``; ``delta`` itself if all is kept.

    Raises:
        ValueError: If the shapes or types do not fit, or a number is out of range.

    Example:
        >>> keep_largest_relative(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 10.0, -4.0]]), keep=2 / 3)
        tensor([[1., 0., 3.]])
    """
    _check(keep, eps)
    check_update(delta, base)
    total = delta.numel()
    count = max(1, round(keep * total))
    if count >= total:
        return delta
    change = (delta.abs() / (base.abs() + eps)).flatten()
    # Not torch.quantile, which takes no more than 16 million entries.
    border = change.kthvalue(total - count + 1).values
    chosen = change > border
    missing = count - int(chosen.sum())
    chosen[(change == border).nonzero()[:missing, 0]] = True
    return torch.where(chosen.view_as(delta), delta, torch.zeros_like(delta))


def _check(keep: float, eps: float) -> None:
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive and finite, got {eps}")
