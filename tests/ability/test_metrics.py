"""Accuracy, F1, MCC and their intervals, against figures worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lit_edit.ability.metrics import (
    NONE,
    accuracy_change,
    bootstrap,
    matthews,
    score_choices,
    weighted_f1,
    wilson,
)


def test_wilson_by_hand() -> None:
    """8 of 10: centre (0.8 + 3.8415/20) / (1 + 0.38415) = 0.71674, half width 0.22642 (Wilson 1927)."""
    z2 = 1.959964**2
    centre = (0.8 + z2 / 20) / (1 + z2 / 10)
    half = 1.959964 * math.sqrt(0.8 * 0.2 / 10 + z2 / 400) / (1 + z2 / 10)
    assert (centre, half) == pytest.approx((0.71674, 0.22658), abs=5e-4)
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_wilson_at_the_ends() -> None:
    assert wilson(0, 10) == pytest.approx((0.0, z2_share(10)))
    assert wilson(10, 10) == pytest.approx((1 - z2_share(10), 1.0))
    for hits, trials in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="hits"):
            wilson(hits, trials)


def z2_share(trials: int) -> float:
    """Of no hits the interval ends at z^2 / (n + z^2)."""
    return 1.959964**2 / (trials + 1.959964**2)


# Option 0 is right 4 times and named 5 times, 3 of them rightly; option 1 is right 6 times, named 4 times, 3 rightly.
GOLD = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
SAID = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0, 0, NONE])


def test_weighted_f1_by_hand() -> None:
    first, second = 2 * 3 / (5 + 4), 2 * 3 / (4 + 6)  # 2 tp / (named + right)
    assert weighted_f1(GOLD, SAID, 2).item() == pytest.approx(0.4 * first + 0.6 * second)


def test_mcc_of_two_options_by_hand() -> None:
    """tp 3, fn 1, fp 2, tn 4 for option 0: (3*4 - 2*1) / sqrt(5*4*6*5)."""
    said = torch.where(SAID == NONE, 1, SAID)
    assert matthews(GOLD, said, 2).item() == pytest.approx(10 / math.sqrt(600))


def test_mcc_with_unparsable_answers_by_hand() -> None:
    """Gorodkin 2004: (c s - sum p t) / sqrt((s^2 - sum p^2)(s^2 - sum t^2)) with c right of s items."""
    covered = 6 * 10 - (5 * 4 + 4 * 6 + 1 * 0)
    assert matthews(GOLD, SAID, 2).item() == pytest.approx(covered / math.sqrt((100 - 42) * (100 - 52)))


def test_a_model_that_always_says_the_same_has_no_correlation() -> None:
    gold = [0, 1] * 5
    for said in (0, 1, NONE):
        scores = score_choices(gold, [said] * 10, 2)
        assert scores["mcc"] == scores["mcc_low"] == scores["mcc_high"] == 0
    assert score_choices(gold, [NONE] * 10, 2)["f1"] == 0
    perfect = score_choices(gold, gold, 2)
    assert perfect.pop("accuracy_low") == pytest.approx(1 - z2_share(10))
    assert {round(value, 9) for value in perfect.values()} == {1.0}


def test_samples_are_measured_each_by_itself() -> None:
    gold, said = torch.stack([GOLD, GOLD.flip(0)]), torch.stack([SAID, SAID])
    for metric in (weighted_f1, matthews):
        each = [metric(g, s, 2).item() for g, s in zip(gold, said, strict=True)]
        assert metric(gold, said, 2).tolist() == pytest.approx(each)


def test_the_bootstrap_is_the_same_each_time_and_follows_its_seed() -> None:
    def run(seed: int) -> tuple[float, float]:
        return bootstrap(lambda g, c: weighted_f1(g, c, 2), GOLD, SAID, seed)

    assert run(0) == run(0)
    assert run(0) != run(1)
    low, high = run(0)
    assert low < weighted_f1(GOLD, SAID, 2).item() < high


def test_the_bootstrap_of_a_mean_has_the_normal_width() -> None:
    """Of 400 fair coins: 1.96 * 0.5 / sqrt(400) = 0.049 on both sides."""
    coins = torch.arange(400) % 2
    low, high = bootstrap(lambda g, c: g.double().mean(-1), coins, coins, resamples=2000)
    assert (low, high) == pytest.approx((0.451, 0.549), abs=0.008)


def test_a_change_is_measured_on_pairs() -> None:
    gold = [0, 1] * 50
    before = [*gold[:60], *(1 - g for g in gold[60:])]
    after = [*gold[:70], *(1 - g for g in gold[70:])]
    change = accuracy_change(gold, before, after)
    assert change["accuracy"] == pytest.approx(0.1)
    # Ten of a hundred have changed, all for the better: 0.1 +- 1.96 * 0.03; apart, the two would spread over 0.13.
    assert (change["accuracy_low"], change["accuracy_high"]) == pytest.approx((0.041, 0.159), abs=0.015)


def test_no_change_seen_is_not_no_change_known() -> None:
    found = accuracy_change([0] * 100, [0] * 100, [0] * 100)
    # By hand: 1.96 * sqrt(1) / 102.
    assert (found["accuracy"], found["accuracy_high"]) == (0.0, pytest.approx(0.0192, abs=1e-4))
    assert found["accuracy_low"] == -found["accuracy_high"]


@pytest.mark.parametrize(("gold", "chosen"), [([], []), ([0], [0, 1])])
def test_nothing_to_score(gold: list[int], chosen: list[int]) -> None:
    with pytest.raises(ValueError, match="expected a choice per item"):
        score_choices(gold, chosen, 2)
