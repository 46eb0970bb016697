"""Averages and fractions, by hand."""

from __future__ import annotations

import math

import pytest

from lit_edit.studies.tracing import FactTrace, average_effects, fraction_restored
from lit_edit.studies.tracing.figures import draw_averages, draw_fact
from lit_edit.studies.tracing.summary import effects_by_role, total_effect

# Two layers. One: a subject of two tokens and three more behind; other: a subject of one, behind a first word.
ONE = FactTrace(
    "1", "a b c $d e", ("a", "b", "c", "$d", "e"), (0, 2), "x", 0.9, 0.1,
    {"mlp": ((0.1, 0.5, 0.1, 0.2, 0.3), (0.1, 0.3, 0.1, 0.1, 0.9))},
)  # fmt: skip
OTHER = FactTrace(
    "2", "The f g h i j", ("The", "f", "g", "h", "i", "j"), (1, 2), "y", 0.6, 0.2,
    {"mlp": ((0.8, 0.2, 0.4, 0.2, 0.2), (0.1, 0.2, 0.2, 0.2, 0.5))},
)  # fmt: skip


def test_effects_by_role() -> None:
    effects = effects_by_role(OTHER, "mlp")
    assert list(effects) == ["last subject token", "first subsequent token", "further tokens", "last token"]
    assert effects["last subject token"] == pytest.approx([0.6, -0.1])
    assert effects["further tokens"] == pytest.approx([0.1, 0.0])  # of h and i: 0.2 and 0.0, then both 0.0
    assert effects["last token"] == pytest.approx([0.0, 0.3])


def test_average_indirect_effects() -> None:
    averages = {(a.role, a.layer): a for a in average_effects([ONE, OTHER])}
    found = averages["last subject token", 0]  # 0.4 and 0.6
    assert (found.kind, found.facts) == ("mlp", 2)
    assert (found.effect, found.error) == (pytest.approx(0.5), pytest.approx(0.1))
    found = averages["further tokens", 0]  # 0.1 ($d) and 0.1 (h, i)
    assert (found.effect, found.error, found.facts) == (pytest.approx(0.1), pytest.approx(0.0), 2)
    found = averages["first subject token", 1]
    assert (found.effect, found.facts) == (pytest.approx(0.0), 1)
    assert math.isnan(found.error)
    assert len(averages) == 5 * 2  # nothing has middle tokens
    assert average_effects([]) == []


def test_total_effect() -> None:
    assert total_effect([ONE, OTHER]) == (pytest.approx(0.6), pytest.approx(0.2))


def test_fraction_restored_is_that_of_the_best_token() -> None:
    assert fraction_restored(ONE, "mlp") == pytest.approx([0.5, 1.0])
    assert fraction_restored(OTHER, "mlp") == pytest.approx([1.5, 0.75])
    worse = FactTrace("3", "a b", ("a", "b"), (0, 1), "x", 0.2, 0.5, {"mlp": ((0.4, 0.3), (0.8, 0.1))})
    assert fraction_restored(worse, "mlp") == pytest.approx([0.0, 1.0])  # noise that helps: over its absolute value
    idle = FactTrace("4", "a b", ("a", "b"), (0, 1), "x", 0.2, 0.2, {"mlp": ((0.4, 0.3),)})
    assert math.isnan(fraction_restored(idle, "mlp")[0])


def test_figures_show_the_numbers() -> None:
    [axis, *_] = draw_fact(OTHER).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["The", "f*", "g", "h", "i", "j"]
    image = axis.images[0].get_array()
    assert image[:, 0].tolist() == [0.2, 0.8, 0.2, 0.4, 0.2, 0.2]  # layer 0; nothing is corrupted before the subject
    figure = draw_averages(average_effects([ONE, OTHER]), title="t")
    axes = {axis.get_gid(): axis for axis in figure.axes if axis.get_gid()}
    lines = {line.get_gid(): list(line.get_ydata()) for line in axes["mlp curves"].lines if line.get_gid()}
    assert lines["last token"] == pytest.approx([0.1, 0.55])
    assert axes["mlp map"].images[0].get_array().shape == (5, 2)
