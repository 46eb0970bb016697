"""Each torchmetrics class against its functional twin: averaged within an edit, then over edits."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_edit import metrics as M  # noqa: N812
from lit_edit.metrics import functional as F  # noqa: N812

pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")

Edit = tuple[Any, ...]


def nll_pairs(generator: torch.Generator, edits: int) -> list[Edit]:
    sizes = [1 + i % 3 for i in range(edits)]
    return [tuple(torch.rand(2, n, generator=generator, dtype=torch.float64).unbind()) for n in sizes]


def hits(generator: torch.Generator, edits: int) -> list[Edit]:
    return [([torch.rand(1 + (i + j) % 3, generator=generator) > 0.4 for j in range(1 + i % 2)],) for i in range(edits)]


def choices(generator: torch.Generator, edits: int) -> list[Edit]:
    def draw(i: int) -> list[Tensor]:
        return [torch.randint(0, 2, (1 + (i + j) % 3,), generator=generator) for j in range(1 + i % 2)]

    return [(draw(i), draw(i)) for i in range(edits)]


CASES: list[tuple[type, Callable[..., Tensor], Callable[..., list[Edit]]]] = [
    (M.Success, F.success, nll_pairs),
    (M.Magnitude, F.magnitude, nll_pairs),
    (M.ExactAccuracy, F.accuracy, hits),
    (M.TokenAccuracy, F.token_accuracy, hits),
    (M.Agreement, F.agreement, choices),
]
every_class = pytest.mark.parametrize(
    ("family", "twin", "draw"), CASES, ids=lambda value: getattr(value, "__name__", "")
)


def filled(family: type, edits: list[Edit]) -> Any:
    metric = family()
    for edit in edits:
        metric.update(*edit)
    return metric


@every_class
def test_class_equals_twin_averaged_over_edits(family: type, twin: Any, draw: Any) -> None:
    edits = draw(torch.Generator().manual_seed(0), 11)
    values = [twin(*edit).item() for edit in edits]
    assert len(set(values)) > 1
    assert filled(family, edits).compute().item() == pytest.approx(sum(values) / len(values), abs=1e-7)


@every_class
def test_two_halves_merge_into_the_whole(family: type, twin: Any, draw: Any) -> None:
    edits = draw(torch.Generator().manual_seed(1), 9)
    left, right = filled(family, edits[:4]), filled(family, edits[4:])
    left.merge_state(right)
    assert left.compute().item() == pytest.approx(filled(family, edits).compute().item(), abs=1e-12)


@every_class
def test_reset_clone_and_pickle(family: type, twin: Any, draw: Any) -> None:
    edits = draw(torch.Generator().manual_seed(2), 5)
    metric = filled(family, edits)
    value = metric.compute().item()
    copies = [metric.clone(), pickle.loads(pickle.dumps(metric))]  # noqa: S301
    metric.reset()
    assert math.isnan(metric.compute().item())
    for copy in copies:
        assert copy.compute().item() == value
        copy.update(*edits[0])  # goes on from where it was
        assert copy.compute().item() == pytest.approx(filled(family, [*edits, edits[0]]).compute().item(), abs=1e-12)


@every_class
def test_nothing_seen_is_nan_and_bad_input_leaves_no_trace(family: type, twin: Any, draw: Any) -> None:
    assert math.isnan(family().compute().item())
    edits = draw(torch.Generator().manual_seed(3), 3)
    metric = filled(family, edits)
    with pytest.raises(ValueError, match="expected"):
        metric.update(*([torch.tensor([])] for _ in edits[0]) if draw is not nll_pairs else (torch.tensor([]),) * 2)
    assert metric.compute().item() == filled(family, edits).compute().item()


def test_prompts_are_averaged_within_an_edit_first() -> None:
    metric = M.Success()
    metric.update(torch.tensor([0.0]), torch.tensor([1.0]))
    metric.update(torch.tensor([2.0, 2.0, 2.0]), torch.tensor([1.0, 1.0, 1.0]))
    assert metric.compute().item() == 0.5  # and not 1/4


def test_forward_returns_the_value_of_one_edit() -> None:
    metric = M.Success()
    assert metric(torch.tensor([0.0]), torch.tensor([1.0])).item() == 1.0
    assert metric(torch.tensor([2.0]), torch.tensor([1.0])).item() == 0.0
    assert metric.compute().item() == 0.5


@pytest.mark.parametrize("family", [M.Success, M.HarmonicScore])
def test_the_sums_stay_double_precision_in_a_low_precision_module(family: type) -> None:
    holder = torch.nn.ModuleDict({"metric": family()}).to(torch.bfloat16)
    sums = [state for state in holder["metric"].metric_state.values() if state.is_floating_point()]
    assert [s.dtype for s in sums] == [torch.float64]


def texts(seed: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [5 * torch.rand(i % 4, generator=generator) for i in range(count)]  # some are empty


def test_text_perplexity_equals_its_twin_and_merges() -> None:
    rows = texts(0, 11)
    left, right, whole = M.TextPerplexity(), M.TextPerplexity(), M.TextPerplexity()
    left.update(rows[:5])
    right.update(rows[5:])
    whole.update(rows[:3])
    whole.update(rows[3:])
    assert whole.compute() == pytest.approx(F.perplexity(rows), rel=1e-12)
    left.merge_state(right)
    assert left.compute() == pytest.approx(F.perplexity(rows), rel=1e-12)
    again = pickle.loads(pickle.dumps(whole))  # noqa: S301
    assert again.compute() == whole.clone().compute() == whole.compute()


def test_text_perplexity_of_nothing_is_an_error() -> None:
    metric = M.TextPerplexity()
    metric.update([torch.tensor([])])
    with pytest.raises(ValueError, match="at least one text"):
        metric.compute()


def win_or_lose(wins: bool) -> tuple[Tensor, Tensor]:
    return (torch.tensor([1.0]), torch.tensor([2.0])) if wins else (torch.tensor([2.0]), torch.tensor([1.0]))


def test_harmonic_score_equals_its_twin_over_edits_with_missing_kinds() -> None:
    metric = M.HarmonicScore()
    metric.update(win_or_lose(True), win_or_lose(False), win_or_lose(True))
    metric.update(win_or_lose(True), win_or_lose(True))
    metric.update(win_or_lose(False), None, win_or_lose(False))
    expected = F.harmonic_score([2 / 3, 1 / 2, 1 / 2])
    assert metric.clone().compute().item() == pytest.approx(
        expected
    )  # torchmetrics keeps a computed value when merging
    other = M.HarmonicScore()
    other.update(None, win_or_lose(True), win_or_lose(True))
    metric.merge_state(other)
    assert metric.compute().item() == pytest.approx(F.harmonic_score([2 / 3, 2 / 3, 2 / 3]))


def test_harmonic_score_is_nan_without_one_of_the_kinds_and_zero_when_one_is_zero() -> None:
    metric = M.HarmonicScore()
    assert math.isnan(metric.compute().item())
    metric.update(win_or_lose(True), win_or_lose(True))
    assert math.isnan(metric.compute().item())
    metric.update(locality=win_or_lose(False))
    assert metric.compute().item() == 0.0
