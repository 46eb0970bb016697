"""The formulas of UltraEdit (arXiv 2505.14679): pure functions; rows are tokens, deltas are ``(d_out, d_in)``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_edit.devices.algebra import outside_autocast
from lit_edit.errors import check_one_of, check_positive
from lit_edit.solvers.functional import check_finite, solve_spd

RidgeScale = Literal["absolute", "relative"]

_NEVER_VARIED = 1e-9  # a deviation below this share of the mean is rounding


@dataclass(frozen=True)
class RunningMoments:
    """Mean and spread of all rows seen so far.

    Attributes:
        count: How many rows.
        mean: ``(d,)``.
        squares: ``(d,)``, the sum of squared deviations from the mean.
    """

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def none(cls, like: Tensor) -> RunningMoments:
        """Return the moments of no rows, for rows like ``(n, d)``."""
        zeros = torch.zeros(like.shape[1], dtype=like.dtype, device=like.device)
        return cls(0, zeros, zeros.clone())

    @property
    def variance(self) -> Tensor:
        """``(d,)``, the unbiased variance; zero, not NaN, of a single row."""
        return self.squares / max(self.count - 1, 1)


def merge_moments(moments: RunningMoments, rows: Tensor) -> RunningMoments:
    r"""Return the moments with some more rows (Welford's update for a block).

    With :math:`m` rows of mean :math:`\bar x` and :math:`\delta = \bar x - \mu`: :math:`\mu \leftarrow \mu + \delta
    m/(n+m)` and :math:`M_2 \leftarrow M_2 + \sum (x - \bar x)^2 + \delta^2\, nm/(n+m)`. The released code adds
    :math:`m` times the unbiased variance in place of the sum, which is NaN for a block of one row.

    Args:
        moments: Of the rows so far.
        rows: ``(m, d)``, at least one.

    Raises:
        ValueError: If the shapes do not fit or there are no rows.
        FactsError: If a value is not finite.

    Example:
        >>> rows = torch.tensor([[1.0], [3.0], [8.0]], dtype=torch.float64)
        >>> moments = merge_moments(merge_moments(RunningMoments.none(rows), rows[:1]), rows[1:])
        >>> moments.count, moments.mean.item(), moments.variance.item()
        (3, 4.0, 13.0)
    """
    if rows.dim() != 2 or rows.shape[1] != len(moments.mean) or not len(rows):
        raise ValueError(f"rows must be (m, d) = (at least 1, {len(moments.mean)}), got {tuple(rows.shape)}")
    check_finite(rows=rows)
    block, total = len(rows), moments.count + len(rows)
    mean = rows.mean(0)
    shift = mean - moments.mean
    squares = (rows - mean).square().sum(0) + shift.square() * (moments.count * block / total)
    return RunningMoments(total, moments.mean + shift * (block / total), moments.squares + squares)


def normalise(rows: Tensor, moments: RunningMoments, warm_up: float = 0.0) -> Tensor:
    r"""Centre and scale rows by the moments, :math:`(x - w\mu) / \sqrt{s^2 + (1-w)^2\mu^2}`.

    With :math:`w = n/(n + warm\_up)`: as if so many rows of mean zero had been seen before. Zero is the published
    :math:`(x - \mu)/s`. That makes nothing of a first row (it is its own mean) and points two first rows in opposite
    directions; with a warm-up early rows keep most of their own direction.

    Entries that have never varied become zero: what is left of them is rounding.

    Args:
        rows: ``(m, d)``.
        moments: Of all rows so far, these included.
        warm_up: Not negative; infinite never centres.

    Returns:
        ``(m, d)``.

    Raises:
        ValueError: If the shapes do not fit or ``warm_up`` is negative.

    Example:
        >>> rows = torch.tensor([[1.0], [3.0], [8.0]], dtype=torch.float64)
        >>> normalise(rows, merge_moments(RunningMoments.none(rows), rows)).std().round(decimals=6).item()
        1.0
    """
    if rows.dim() != 2 or rows.shape[1] != len(moments.mean):
        raise ValueError(f"rows must be (m, d) = (m, {len(moments.mean)}), got {tuple(rows.shape)}")
    if not warm_up >= 0:
        raise ValueError(f"warm_up must not be negative, got {warm_up}")
    weight = 0.0 if math.isinf(warm_up) or not moments.count else moments.count / (moments.count + warm_up)
    deviation = (moments.variance + ((1 - weight) * moments.mean).square()).sqrt()
    varies = deviation > _NEVER_VARIED * moments.mean.abs()
    scaled = (rows - weight * moments.mean) / torch.where(varies, deviation, torch.ones_like(deviation))
    return torch.where(varies, scaled, torch.zeros_like(scaled))


def pseudo_values(inputs: Tensor, gradients: Tensor, eta: float) -> Tensor:
    r"""Return what a layer is to add to its output at each token, :math:`v = -\eta\,\|\hat h\|^2\,\hat g`.

    Args:
        inputs: :math:`\hat h`, ``(tokens, d_in)``, normalised.
        gradients: :math:`\hat g`, ``(tokens, d_out)``, normalised.
        eta: The step; 1e-6 as published.

    Returns:
        ``(tokens, d_out)``.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> pseudo_values(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0]]), eta=0.1)
        tensor([[-5.]])
    """
    _check_rows(inputs, gradients, "gradients")
    return -eta * inputs.square().sum(1, keepdim=True) * gradients


@outside_autocast
def ridge_increment(inputs: Tensor, values: Tensor, ridge: float = 1.0, scale: RidgeScale = "absolute") -> Tensor:
    r"""Return :math:`D = ((H^\top H + r I)^{-1} H^\top V)^\top`, ``(d_out, d_in)``: least squares that says ``values``.

    The same as :math:`V^\top (H H^\top + r I)^{-1} H`, which is solved where there are fewer tokens than inputs: the
    published form costs :math:`O(d_{in}^3)` however few the tokens.

    Args:
        inputs: :math:`H`, ``(tokens, d_in)``, raw.
        values: :math:`V`, ``(tokens, d_out)``.
        ridge: :math:`r`; 1 as published.
        scale: What it is measured in: ``absolute``, or ``relative`` to the mean of :math:`\|h\|^2` over the tokens. The
            size of inputs differs by orders of magnitude between models and layers, and so does what 1 means.

    Raises:
        ValueError: If the shapes do not fit, ``ridge`` is not positive, or (``FactsError``) a value is not finite.

    Example:
        >>> eye = torch.eye(2, dtype=torch.float64)
        >>> ridge_increment(eye[:1], 4 * eye[1:]).round(decimals=6)
        tensor([[0., 0.],
                [2., 0.]], dtype=torch.float64)
    """
    _check_rows(inputs, values, "values")
    check_positive(ridge=ridge)
    check_one_of(("absolute", "relative"), scale=scale)
    check_finite(inputs=inputs, values=values)
    tokens, size = inputs.shape
    weight = ridge if scale == "absolute" else ridge * float(inputs.square().sum()) / max(tokens, 1)
    if not tokens or weight == 0:  # inputs of zero say nothing
        return inputs.new_zeros(values.shape[1], size)
    dual = tokens < size
    gram = inputs @ inputs.T if dual else inputs.T @ inputs
    gram.diagonal().add_(weight)
    return values.T @ solve_spd(gram, inputs) if dual else solve_spd(gram, inputs.T @ values).T


def _check_rows(inputs: Tensor, other: Tensor, name: str) -> None:
    if inputs.dim() != 2:
        raise ValueError(f"inputs must be (tokens, d_in), got {tuple(inputs.shape)}")
    if other.dim() != 2 or len(other) != len(inputs):
        raise ValueError(f"{name} must be (tokens, d_out) = ({len(inputs)}, d_out), got {tuple(other.shape)}")
