"""The formulas, against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from lit_edit.metrics import functional as F  # noqa: N812

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("preferred", "other", "expected"),
    [
        ([1.0], [2.0], 1.0),
        ([2.0], [1.0], 0.0),
        ([1.0], [1.0], 0.0),  # a tie is no success
        ([1.0, 2.0, 3.0, 0.5], [2.0, 1.0, 3.0, 1.0], 0.5),
        ([0.0], [INF], 1.0),
        ([NAN], [1.0], 0.0),
    ],
)
def test_success(preferred: list[float], other: list[float], expected: float) -> None:
    assert F.success(tensor(preferred), tensor(other)).item() == expected


@pytest.mark.parametrize(
    ("preferred", "other", "expected"),
    [
        ([0.0], [INF], 1.0),
        ([INF], [0.0], -1.0),
        ([math.log(2)], [math.log(4)], 0.25),
        ([math.log(2), math.log(10)], [math.log(4), math.log(2)], (0.25 - 0.4) / 2),
    ],
)
def test_magnitude(preferred: list[float], other: list[float], expected: float) -> None:
    value = F.magnitude(tensor(preferred, dtype=torch.float64), tensor(other, dtype=torch.float64))
    assert value.item() == pytest.approx(expected, abs=1e-12)


HITS = [tensor([True, False, True]), tensor([True]), tensor([True, True]), tensor([False, False])]


def test_accuracy_asks_for_every_token_and_token_accuracy_averages_within_prompts_first() -> None:
    assert F.accuracy(HITS).item() == 2 / 4
    assert F.token_accuracy(HITS).item() == pytest.approx((2 / 3 + 1 + 1 + 0) / 4)


def test_agreement_counts_equal_first_choices() -> None:
    before = [tensor([5, 6, 7]), tensor([1])]
    after = [tensor([5, 0, 7]), tensor([2])]
    assert F.agreement(before, after).item() == pytest.approx((2 / 3 + 0) / 2)
    assert F.agreement(before, before).item() == 1.0


def test_perplexity_of_three_texts() -> None:
    logs = [[math.log(2)] * 3, [math.log(8)], [math.log(2), math.log(32)], []]
    found = F.perplexity([tensor(log, dtype=torch.float64) for log in logs])
    assert found["mean"] == pytest.approx((2 + 8 + 8) / 3)
    assert found["median"] == pytest.approx(8)
    assert found["corpus"] == pytest.approx(2 ** ((3 + 3 + 1 + 5) / 6))


def test_the_median_of_an_even_number_of_texts_lies_between_the_middle_two() -> None:
    nlls = [tensor([math.log(v)], dtype=torch.float64) for v in (1, 2, 4, 100)]
    assert F.perplexity(nlls)["median"] == pytest.approx(3)


def test_perplexity_is_computed_in_double_precision() -> None:
    assert F.perplexity([tensor([100.0])])["mean"] == pytest.approx(math.exp(100), rel=1e-12)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 1.0, 1.0], 1.0),
        ([0.5, 1.0, 0.25], 3 / (2 + 1 + 4)),
        ([0.0, 1.0, 1.0], 0.0),
        ([1.0, None, 1.0], None),
        ([1.0, NAN, 1.0], None),
        ([], None),
    ],
)
def test_harmonic_score(values: list[float | None], expected: float | None) -> None:
    assert F.harmonic_score(values) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize("function", [F.success, F.magnitude])
@pytest.mark.parametrize(("preferred", "other"), [([], []), ([1.0], [1.0, 2.0]), ([[1.0]], [[2.0]]), (1.0, 2.0)])
def test_pairs_must_be_vectors_of_one_length(function: object, preferred: object, other: object) -> None:
    with pytest.raises(ValueError, match="equally long, non-empty vectors"):
        function(tensor(preferred), tensor(other))  # type: ignore[operator]


@pytest.mark.parametrize("function", [F.accuracy, F.token_accuracy])
@pytest.mark.parametrize("hits", [[], [tensor([], dtype=torch.bool)], [tensor([True]), tensor([[True]])]])
def test_hits_must_hold_a_token_each(function: object, hits: list[torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        function(hits)  # type: ignore[operator]


def test_agreement_needs_matching_sides() -> None:
    with pytest.raises(ValueError, match="as many prompts"):
        F.agreement([tensor([1])], [])
    with pytest.raises(ValueError, match="as many tokens"):
        F.agreement([tensor([1, 2])], [tensor([1])])


@pytest.mark.parametrize("nlls", [[], [tensor([])]])
def test_perplexity_of_nothing_is_an_error(nlls: list[torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="at least one text"):
        F.perplexity(nlls)
