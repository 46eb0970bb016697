"""Age curves, by hand."""

from __future__ import annotations

import pytest

from lit_edit.metrics import AgeCurve
from lit_edit.metrics.ages import AgeBin, EarlyLate, age_curve, aged, early_late

# Ten edits in the order of making: the oldest ones are lost.
VALUES = [0.0, 0.0, 0.0, 1.0, None, 1.0, 0.0, 1.0, 1.0, 1.0]


def test_the_curve_runs_from_young_to_old() -> None:
    assert age_curve(VALUES, 4) == [
        AgeBin(0, 3, 3 / 4, 4),  # 1 1 1 0
        AgeBin(4, 7, 2 / 3, 3),  # 1 - 1 0
        AgeBin(8, 9, 0.0, 2),
    ]
    assert age_curve([None], 3) == [AgeBin(0, 0, None, 0)]
    assert age_curve([], 3) == []


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        (3, EarlyLate(0.0, 1.0, 3)),
        (0.4, EarlyLate(1 / 4, 3 / 4, 4)),
        (100, EarlyLate(1 / 4, 4 / 5, 5)),  # no more than half of them: 0 0 0 1 - against 1 0 1 1 1
        (0.01, EarlyLate(0.0, 1.0, 1)),
    ],
)
def test_early_against_late(ends: float, expected: EarlyLate) -> None:
    assert early_late(VALUES, ends) == expected


def test_one_edit_is_neither_early_nor_late() -> None:
    assert early_late([1.0]) == EarlyLate(None, None, 0)


def test_the_metric_orders_what_comes_in_any_order() -> None:
    metric = AgeCurve(width=4, ends=3)
    for number in (3, 9, 0, 1, 2, 8, 7, 6, 5, 4):
        metric.update(number, VALUES[number])
    assert metric.compute() == aged(VALUES, 4, 3)
    assert metric.compute()["early"] == 0.0
    assert metric.compute()["curve"][2] == {"youngest": 8, "oldest": 9, "mean": 0.0, "count": 2}


@pytest.mark.parametrize("ends", [0, -1, 2.5])
def test_ends_that_are_neither_number_nor_share_are_refused(ends: float) -> None:
    with pytest.raises(ValueError, match="ends must be a number of edits, or a share"):
        early_late(VALUES, ends)
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        age_curve(VALUES, 0)
