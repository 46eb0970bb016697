"""Forgetting by age: how edits do that many later ones have been made on top of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lit_edit.errors import check_least


@dataclass(frozen=True)
class AgeBin:
    """Edits of about the same age."""

    youngest: int  # edits made since the youngest of them, 0 for the last edit of all
    oldest: int  # the same of the oldest of them
    mean: float | None  # of their values; None if none has one
    count: int  # how many have one


@dataclass(frozen=True)
class EarlyLate:
    """The first and the last edits of a stream."""

    early: float | None  # mean over the first ``size`` edits; None if none of them has a value
    late: float | None  # the same over the last
    size: int  # how many edits stand on either side; the sides never share one


def age_curve(values: Sequence[float | None], width: int) -> list[AgeBin]:
    r"""Return the mean value by age :math:`t - i`: of the :math:`t` edits, the :math:`i`-th has that many behind it.

    Values are those of the edits now, in the order of making, ``None`` where there is none. The bins, of ``width``
    ages, go from young to old; the last may be short.

    Example:
        >>> [(bin.youngest, bin.oldest, bin.mean) for bin in age_curve([0.0, 1.0, 0.5, 1.0, 1.0], 2)]
        [(0, 1, 1.0), (2, 3, 0.75), (4, 4, 0.0)]
    """
    check_least(1, width=width)
    by_age = values[::-1]
    parts = [(start, by_age[start : start + width]) for start in range(0, len(by_age), width)]
    return [
        AgeBin(start, start + len(part) - 1, mean_of_known(part), sum(value is not None for value in part))
        for start, part in parts
    ]


def early_late(values: Sequence[float | None], ends: int | float = 100) -> EarlyLate:
    """Return the means over the first and over the last edits: so many on either side, or a share of all below 1.

    Values are as for :func:`age_curve`; no more than half of the edits are an end.

    Example:
        >>> early_late([0.0, 0.0, 1.0, 1.0, 0.5], ends=2)
        EarlyLate(early=0.0, late=0.75, size=2)
        >>> early_late([0.0, 1.0, 1.0], ends=0.4).size
        1
    """
    if not ends > 0 or (ends >= 1 and ends != int(ends)):
        raise ValueError(f"ends must be a number of edits, or a share of them between 0 and 1, got {ends}")
    total = len(values)
    size = min(int(ends) if ends >= 1 else max(1, math.floor(ends * total)), total // 2)
    return EarlyLate(mean_of_known(values[:size]), mean_of_known(values[total - size :]), size)


def aged(values: Sequence[float | None], width: int, ends: int | float = 100) -> dict[str, Any]:
    """Return :func:`early_late` and :func:`age_curve` as primitives, for a summary.

    Returns:
        ``{"early", "late", "size", "curve": [{"youngest", "oldest", "mean", "count"}]}``.
    """
    curve = [asdict(part) for part in age_curve(values, width)]
    return {**asdict(early_late(values, ends)), "curve": curve}


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that there are; ``None`` without any."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
