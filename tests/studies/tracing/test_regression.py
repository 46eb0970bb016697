"""The regression of edit success on layer and tracing effect, by hand."""

from __future__ import annotations

import pytest

from lit_edit.studies.tracing.regression import regress

LAYERS = [3, 3, 3, 7, 7, 7]
EFFECTS = [-1.0, 0.0, 1.0, -1.0, 0.0, 1.0]
# 4 at layer 7, the effect itself, and what neither explains: 1, -2, 1, -1, 2, -1. Squares: 24, 4 and 12 of 40.
SCORES = [0.0, -2.0, 2.0, 2.0, 6.0, 4.0]


def test_shares_that_can_be_told_by_hand() -> None:
    fit = regress(SCORES, LAYERS, EFFECTS)
    assert (fit.layer, fit.effect, fit.both) == (pytest.approx(0.6), pytest.approx(0.1), pytest.approx(0.7))
    assert fit.gain == pytest.approx(0.1)
    assert fit.statistic == pytest.approx(1.0)  # (16 - 12) / (12 / 3)
    assert fit.p_value == pytest.approx(0.391002, abs=1e-6)  # of t = 1 with 3 degrees of freedom, two-sided


def test_an_effect_that_only_names_the_layer_adds_nothing() -> None:
    fit = regress(SCORES, LAYERS, [0.1 + 0.2 * (layer == 7) for layer in LAYERS])
    assert fit.gain == pytest.approx(0, abs=1e-12)
    assert fit.p_value == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("scores", "layers", "effects", "message"),
    [
        ([1.0], [1, 2], [1.0], "differ in number: 1, 2, 1"),
        ([1.0, 2.0], [1, 2], [0.0, 1.0], "2 edits are too few for 2 layers"),
        ([1.0] * 6, LAYERS, EFFECTS, "all the same"),
        (SCORES, LAYERS, [float("nan"), *EFFECTS[1:]], "must be finite"),
    ],
)
def test_what_cannot_be_fitted(scores: list[float], layers: list[int], effects: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        regress(scores, layers, effects)
