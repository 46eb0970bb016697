"""PRUNE: singular values of an update that exceed those of the weight are compressed."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_edit.devices.algebra import outside_autocast
from lit_edit.editors.transforms.base import UpdateTransform, check_update
from lit_edit.files.checksum import checksum

_REMEMBERED = 128  # weights whose norms are kept: more than a model has edited layers


@dataclass(frozen=True)
class PRUNE(UpdateTransform):
    r"""Compresses the singular values of the update above the weight's largest one (PRUNE, arXiv 2405.16821).

    :math:`\sigma' = \log_a \sigma - \log_a \sigma_{\max}(W_0) + \sigma_{\max}(W_0)` where :math:`\sigma` exceeds
    :math:`\sigma_{\max}(W_0)`; an update without such values is left as it is, bit for bit. With a base below :math:`e`
    more is left.

    The weight becomes :math:`W_0 + D'`. The baseline in AlphaEdit's code adds :math:`D'` to the weights that are edited
    already, :math:`W_0 + D + D'`: nothing is taken out, and numbers made with it say little about the method. Here
    :math:`D` is the whole update relative to :math:`W_0`, and what is written is made of it anew at every edit.

    Applied a second time it compresses further: it is to be applied to what an editor has solved, not to what was
    written.

    Args:
        base: Of the logarithm: ``e``, or a number above 1.

    Example:
        >>> delta, weight = torch.diag(torch.tensor([math.e, 0.5], dtype=torch.float64)), torch.eye(2).double()
        >>> PRUNE()(delta, weight).round(decimals=6)
        tensor([[2.0000, 0.0000],
                [0.0000, 0.5000]], dtype=torch.float64)
    """

    base: Literal["e"] | float = "e"

    def __post_init__(self) -> None:
        _logarithm(self.base)
        norms: OrderedDict[str, float] = OrderedDict()
        object.__setattr__(self, "_norms", norms)  # no field: neither a setting nor part of what is compared

    @outside_autocast
    def __call__(self, delta: Tensor, base: Tensor) -> Tensor:
        """Return the compressed update ``(d_out, d_in)``; itself if no singular value is above the limit."""
        check_update(delta, base)
        if _surely_below(delta, base):
            return delta
        limit = self._norm_of(base)
        if limit == 0:  # a weight of zeros has no scale to compress to
            return delta
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        above = int((values > limit).sum())
        if not above:
            return delta
        values = values[:above]  # descending
        change = torch.log(values / limit) / _logarithm(self.base) + limit - values
        # Added to what there is: the directions that stay keep their digits.
        return delta + (left[:, :above] * change) @ right[:above]

    def _norm_of(self, base: Tensor) -> float:
        """Return the largest singular value of a weight, computed once.

        Weights are told apart by their bits: those handed over are copies in the update's type, made anew each time.
        """
        norms: OrderedDict[str, float] = vars(self)["_norms"]
        name = f"{tuple(base.shape)} {base.dtype} {checksum(base)}"
        if name not in norms:
            norms[name] = spectral_norm(base)
            if len(norms) > _REMEMBERED:
                norms.popitem(last=False)
        norms.move_to_end(name)
        return norms[name]


@outside_autocast
def spectral_norm(matrix: Tensor) -> float:
    r"""Return the largest singular value of a matrix ``(rows, columns)``.

    It is the root of the largest eigenvalue of the smaller of :math:`W W^\top` and :math:`W^\top W`: several times as
    fast as all singular values, and as accurate for the largest one (not for the small ones).

    Example:
        >>> spectral_norm(torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64)))
        3.0
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return math.sqrt(max(float(torch.linalg.eigvalsh(wide @ wide.T)[-1]), 0.0))


def _surely_below(delta: Tensor, base: Tensor) -> bool:
    """Tell whether no singular value can exceed the weight's largest, without computing either.

    The Frobenius norm is no less than the largest singular value, the norm of a row or a column no more.
    """
    if not delta.numel():
        return True
    largest = torch.maximum(torch.linalg.vector_norm(base, dim=0).amax(), torch.linalg.vector_norm(base, dim=1).amax())
    return bool(torch.linalg.vector_norm(delta) <= largest * (1 - 1e-6))  # a hair less, for rounding


def _logarithm(base: Literal["e"] | float) -> float:
    if base == "e":
        return 1.0
    if isinstance(base, (str, bool)) or not 1 < base < math.inf:
        raise ValueError(f"base must be 'e' or a number above 1, got {base!r}")
    return math.log(base)
