"""Does localization inform editing? Least squares of edit success on the edited layer and on the tracing effect there.

Hase et al. 2023 (arXiv 2301.04213, section 5): each fact is edited at each of some layers; how well that takes is
explained by which layer it was, by what tracing says of that layer for that fact, and by both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LocalizationFit:
    """What three regressions explain of edit success."""

    layer: float  # R² of the edited layer alone (a dummy for each)
    effect: float  # R² of the tracing effect alone
    both: float  # R² of both
    statistic: float  # F, of adding the tracing effect to the layers
    p_value: float  # how probable an F as large is, if the tracing effect says nothing that the layer does not

    @property
    def gain(self) -> float:
        """R² that the tracing effect adds to the layers."""
        return self.both - self.layer


def regress(scores: Sequence[float], layers: Sequence[int], effects: Sequence[float]) -> LocalizationFit:
    """Fit the three regressions to edits of facts at layers: their success, layer and tracing effect.

    Raises:
        ValueError: If they differ in number, are too few, not finite, or the scores are all the same.
    """
    y, x = np.asarray(scores, float), np.asarray(effects, float)
    kinds = sorted(set(layers))
    if not len(y) == len(x) == len(layers):
        raise ValueError(f"scores, layers and effects differ in number: {len(y)}, {len(layers)}, {len(x)}")
    freedom = len(y) - len(kinds) - 1
    if freedom < 1:
        raise ValueError(f"{len(y)} edits are too few for {len(kinds)} layers and the tracing effect; give more")
    if not (np.isfinite(y).all() and np.isfinite(x).all()):
        raise ValueError("scores and effects must be finite; leave out facts that the noise does not change")
    total = float(((y - y.mean()) ** 2).sum())
    if total == 0:
        raise ValueError("the scores are all the same: there is nothing to explain")
    dummies = np.array([[layer == kind for kind in kinds] for layer in layers], float)  # they hold the constant
    by_layer = _residual(dummies, y)
    by_effect = _residual(np.column_stack([np.ones_like(x), x]), y)
    by_both = _residual(np.column_stack([dummies, x]), y)
    from scipy import stats  # takes a second to import

    statistic = (by_layer - by_both) / (by_both / freedom) if by_both > 0 else np.inf
    p_value = float(stats.f.sf(statistic, 1, freedom))
    return LocalizationFit(1 - by_layer / total, 1 - by_effect / total, 1 - by_both / total, float(statistic), p_value)


def _residual(columns: np.ndarray, y: np.ndarray) -> float:
    """Return the sum of squares that least squares leave."""
    solution = np.linalg.lstsq(columns, y, rcond=None)[0]
    return float(((y - columns @ solution) ** 2).sum())
