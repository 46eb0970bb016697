"""RECT: of an update, only what changes the weights most, relative to their size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_edit.editors.transforms.base import UpdateTransform, check_update
from lit_edit.errors import check_positive, check_within


@dataclass(frozen=True)
class RECT(UpdateTransform):
    r"""Keeps the entries with the largest relative change and zeroes the rest (RECT, arXiv 2401.04700).

    Of :math:`|\Delta_{ij}| / (|W_{ij}| + \epsilon)`, exactly ``round(keep * d_out * d_in)`` entries are kept, at least
    one. Of entries that change their weights equally, at the border, the first in the order of rows are kept: a
    threshold alone would keep all of them, or none.

    The idea: an edit changes many entries a little, and those that it hardly changes do more harm than good. The paper
    keeps a fifth to two fifths; AlphaEdit's baseline, whose numbers most tables cite, keeps 0.4.

    What is written is no longer of low rank. Applied a second time it changes nothing.

    Args:
        keep: Share of the entries to keep, above 0; 1 keeps all.
        eps: Added to the size of each weight, so that weights of zero do not divide.

    Example:
        >>> RECT(keep=2 / 3)(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 10.0, -4.0]]))
        tensor([[1., 0., 3.]])
    """

    keep: float = 0.4
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_within("(0, 1]", keep=self.keep)
        check_positive(eps=self.eps)

    def __call__(self, delta: Tensor, base: Tensor) -> Tensor:
        """Return the update ``(d_out, d_in)`` with its small entries zeroed; itself if all is kept."""
        check_update(delta, base)
        total = delta.numel()
        count = max(1, round(self.keep * total))
        if count >= total:
            return delta
        change = (delta.abs() / (base.abs() + self.eps)).flatten()
        # Not torch.quantile, which takes no more than 16 million entries.
        border = change.kthvalue(total - count + 1).values
        chosen = change > border
        missing = count - int(chosen.sum())
        chosen[(change == border).nonzero()[:missing, 0]] = True
        return torch.where(chosen.view_as(delta), delta, torch.zeros_like(delta))
