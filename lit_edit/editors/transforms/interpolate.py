"""One-layer interpolation: a part of the way from the original weights to the edited ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from lit_edit.editors.transforms.base import UpdateTransform, check_update
from lit_edit.errors import check_within

GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Shares to try when none are given."""


@dataclass(frozen=True)
class Interpolate(UpdateTransform):
    r"""Writes :math:`W = (1 - \alpha) W_0 + \alpha W_{edited}` (1-LI, arXiv 2303.00046).

    The paper fine-tunes one layer and goes back a part of the way: what was broken recovers before the edit is lost. It
    applies to the update of any editor, :math:`\alpha D`. :func:`search_alpha` finds the share.

    Args:
        alpha: The share of the update that is written, 0 to 1; 1 is all of it.
    """

    alpha: float

    def __post_init__(self) -> None:
        check_within("[0, 1]", alpha=self.alpha)

    def __call__(self, delta: Tensor, base: Tensor) -> Tensor:
        """Return the share of the update ``(d_out, d_in)``; itself if that is all of it."""
        check_update(delta, base)
        return delta if self.alpha == 1 else self.alpha * delta


def search_alpha(
    measure: Callable[[float], float | None], grid: Iterable[float] = GRID
) -> tuple[float, list[tuple[float, float | None]]]:
    """Find the share that trades off best.

    Args:
        measure: Returns how good the model is with a share of the update, the higher the better; ``None`` or NaN where
            that cannot be said.
        grid: The shares to try.

    Returns:
        The best one, the smallest of several that are equally good (it changes the model least), and all shares with
        what was measured, ascending.

    Raises:
        ValueError: If a share is not in [0, 1], there is none, or none could be measured.

    Example:
        >>> search_alpha(lambda alpha: alpha * (1 - alpha), (0.25, 0.5, 1.0))
        (0.5, [(0.25, 0.1875), (0.5, 0.25), (1.0, 0.0)])
    """
    shares = sorted(set(grid))
    for alpha in shares:
        check_within("[0, 1]", alpha=alpha)
    if not shares:
        raise ValueError("grid must hold at least one alpha, got none")
    table = [(alpha, measure(alpha)) for alpha in shares]
    known = [(value, -alpha) for alpha, value in table if value is not None and not math.isnan(value)]
    if not known:
        raise ValueError(f"measure must return a number for at least one alpha of {shares}, got none")
    return -max(known)[1], table
