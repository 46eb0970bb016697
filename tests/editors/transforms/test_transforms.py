"""Transforms of updates, and the anchoring of targets: the textbook's formula, identities, and what is refused."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_edit.editors.transforms import prune
from lit_edit.editors.transforms.base import UpdateTransform, transformed
from lit_edit.editors.transforms.interpolate import Interpolate, search_alpha
from lit_edit.editors.transforms.norm_anchor import NormAnchor, anchor_targets, reference_norm
from lit_edit.editors.transforms.prune import PRUNE, spectral_norm
from lit_edit.editors.transforms.rect import RECT
from lit_edit.ledger.edit_ledger import EditLedger, LayerUpdate
from lit_edit.metrics.evaluation import evaluate_edits, summarise
from lit_edit.metrics.functional import harmonic_score
from lit_edit.metrics.interpolation import interpolation_rows
from lit_edit.models.adapter import ModelAdapter
from lit_edit.solvers.functional import FactsError
from lit_edit.testing import tiny_model, tiny_requests, tiny_tokenizer

MANY = settings(max_examples=60, deadline=None, database=None, derandomize=True)
EXACT = {"rtol": 1e-12, "atol": 1e-12}
F64 = torch.float64

TRANSFORMS: list[UpdateTransform] = [RECT(0.3), PRUNE(), PRUNE(1.5), Interpolate(0.4)]
every_transform = pytest.mark.parametrize("transform", TRANSFORMS, ids=str)


@st.composite
def updates(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """An update and its weight, of any shape and relative size; with ties, zeros, and low rank."""
    rows, columns = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def random() -> Tensor:
        return torch.randn(rows, columns, dtype=F64, generator=generator)

    delta, base = draw(st.sampled_from([0.01, 1.0, 30.0])) * random(), random()
    if draw(st.booleans()):  # ties, among them zeros
        delta, base = delta.round(), base.sign()
    if draw(st.booleans()):
        delta = delta[:, :1] @ delta[:1]
    return delta, base


def some(rows: int = 5, columns: int = 8, seed: int = 0, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    delta, base = (torch.randn(rows, columns, dtype=F64, generator=generator) for _ in range(2))
    return scale * delta, base


# ---- the textbook -------------------------------------------------------------------------------------------------


def rect_by_sorting(delta: Tensor, base: Tensor, keep: float, eps: float) -> Tensor:
    """Entry by entry: sorted by relative change, those earlier in the order of rows first among equals."""
    places = [(i, j) for i in range(delta.shape[0]) for j in range(delta.shape[1])]
    change = {(i, j): float(delta[i, j].abs() / (base[i, j].abs() + eps)) for i, j in places}
    count = max(1, round(keep * len(places)))
    result = torch.zeros_like(delta)
    for i, j in sorted(places, key=lambda place: (-change[place], place))[:count]:
        result[i, j] = delta[i, j]
    return result


def prune_by_svd(delta: Tensor, base: Tensor, number: float) -> Tensor:
    """All singular values, each compressed or not."""
    limit = float(torch.linalg.svdvals(base)[0])
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    new = [math.log(s, number) - math.log(limit, number) + limit if s > limit else s for s in values.tolist()]
    return left @ torch.diag(torch.tensor(new, dtype=F64)) @ right


@MANY
@given(updates(), st.sampled_from([0.05, 0.2, 0.4, 0.5, 0.99]), st.sampled_from([1e-8, 0.1]))
def test_rect_is_the_textbooks(pair: tuple[Tensor, Tensor], keep: float, eps: float) -> None:
    delta, base = pair
    assert torch.equal(RECT(keep, eps)(delta, base), rect_by_sorting(delta, base, keep, eps))


@MANY
@given(updates(), st.sampled_from([1.2, 1.5, math.e, 10.0]))
def test_prune_is_the_textbooks(pair: tuple[Tensor, Tensor], number: float) -> None:
    delta, base = pair
    if float(base.norm()) == 0 or float(delta.norm()) == 0:
        return
    expected = prune_by_svd(delta, base, number)
    scale = float(delta.norm())
    torch.testing.assert_close(PRUNE(number)(delta, base) / scale, expected / scale, **EXACT)
    if number == math.e:
        torch.testing.assert_close(PRUNE()(delta, base) / scale, expected / scale, **EXACT)


@MANY
@given(updates(), st.floats(0, 1))
def test_interpolation_is_the_textbooks(pair: tuple[Tensor, Tensor], alpha: float) -> None:
    delta, base = pair
    torch.testing.assert_close(
        base + Interpolate(alpha)(delta, base), (1 - alpha) * base + alpha * (base + delta), **EXACT
    )


# ---- identities ---------------------------------------------------------------------------------------------------


@MANY
@given(updates())
def test_identities_keep_the_bits(pair: tuple[Tensor, Tensor]) -> None:
    delta, base = pair
    assert torch.equal(RECT(1.0)(delta, base), delta)
    assert torch.equal(Interpolate(1.0)(delta, base), delta)
    assert not Interpolate(0.0)(delta, base).any()
    weight = base + torch.eye(*base.shape, dtype=F64)
    small = delta * (0.99 * spectral_norm(weight) / max(spectral_norm(delta), 1e-300))
    assert torch.equal(PRUNE(1.2)(small, weight), small)


@MANY
@given(updates(), st.sampled_from([0.05, 0.4, 0.9]))
def test_rect_keeps_an_exact_share_and_twice_is_once(pair: tuple[Tensor, Tensor], keep: float) -> None:
    delta, base = pair
    once = RECT(keep)(delta, base)
    assert int((once != 0).sum()) == min(int((delta != 0).sum()), max(1, round(keep * delta.numel())))
    assert torch.equal(RECT(keep)(once, base), once)
    assert torch.equal(once[once != 0], delta[once != 0])


@MANY
@given(updates())
def test_prune_leaves_directions_and_small_values(pair: tuple[Tensor, Tensor]) -> None:
    delta, base = pair
    limit = spectral_norm(base)
    if limit == 0:
        return
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    rotated = left.T @ PRUNE()(delta, base) @ right.T
    scale = float(values[0]) or 1.0
    torch.testing.assert_close(rotated / scale, torch.diag(rotated.diagonal()) / scale, **EXACT)
    small = values <= limit
    torch.testing.assert_close(rotated.diagonal()[small] / scale, values[small] / scale, **EXACT)


def test_a_compressed_value_is_compressed_again() -> None:
    """Not idempotent, as the docstring says: editors apply it to what was solved, not to what was written."""
    delta, base = some(scale=100.0)
    once = PRUNE()(delta, base)
    twice = PRUNE()(once, base)
    assert float((once - twice).norm()) > 0.1


def test_prune_of_an_update_along_the_weights_own_directions() -> None:
    base = torch.diag(torch.tensor([2.0, 1.0, 0.5], dtype=F64))
    delta = torch.diag(torch.tensor([2 * math.e, 2.0, 0.1], dtype=F64))
    expected = torch.diag(torch.tensor([3.0, 2.0, 0.1], dtype=F64))  # 2 is not above 2
    torch.testing.assert_close(PRUNE()(delta, base), expected, **EXACT)
    expected[0, 0] = 2 + math.log(math.e, 1.5)
    torch.testing.assert_close(PRUNE(1.5)(delta, base), expected, **EXACT)


def test_weights_of_zero() -> None:
    delta, base = some()
    zeros = torch.zeros_like(base)
    assert int((RECT(0.5)(delta, zeros) != 0).sum()) == 20
    assert torch.equal(PRUNE()(delta, zeros), delta)
    assert not PRUNE()(zeros, base).any()
    assert not RECT(0.5)(zeros, base).any()


def test_of_equal_changes_the_first_are_kept() -> None:
    kept = RECT(0.5)(torch.ones(2, 4), torch.ones(2, 4))
    assert kept.tolist() == [[1.0] * 4, [0.0] * 4]
    negative = RECT(0.67)(torch.tensor([[1.0, -1.0, 1.0]]), torch.tensor([[-1.0, 1.0, 1.0]]))
    assert negative.tolist() == [[1.0, -1.0, 0.0]]


def test_rect_of_more_entries_than_quantile_takes() -> None:
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(4100, 4100, generator=generator)  # 16.8 million; torch.quantile refuses above 16 (2 ** 24)
    kept = RECT(0.25)(delta, torch.ones_like(delta))
    assert delta.numel() > 2**24
    assert int((kept != 0).sum()) == round(0.25 * delta.numel())
    assert kept.abs().sum() > 0.5 * delta.abs().sum()


# ---- what all of them keep ----------------------------------------------------------------------------------------


@every_transform
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (4, 4), (3, 9), (9, 3), (0, 3)])
def test_shape_type_and_arguments_stay(transform: UpdateTransform, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    delta, base = (value.to(dtype) for value in some(*shape, scale=50.0))
    before = delta.clone(), base.clone()
    result = transform(delta, base)
    assert result.shape == delta.shape
    assert result.dtype == dtype
    assert torch.equal(delta, before[0])
    assert torch.equal(base, before[1])


@every_transform
def test_transposed_views_give_the_same(transform: UpdateTransform) -> None:
    """Weights of Conv1D come as views."""
    delta, base = some(scale=50.0)
    torch.testing.assert_close(transform(delta, base.T.contiguous().T), transform(delta, base), rtol=0, atol=0)


@every_transform
def test_settings_are_primitives(transform: UpdateTransform) -> None:
    transform(*some(scale=50.0))
    told = transform.settings()
    assert json.loads(json.dumps(told)) == told
    assert told["transform"] == type(transform).__name__
    assert transform == copy.deepcopy(transform)
    with pytest.raises(FrozenInstanceError):
        transform.keep = 0.1  # type: ignore[attr-defined]


def test_settings_tell_what_was_set() -> None:
    assert RECT().settings() == {"transform": "RECT", "keep": 0.4, "eps": 1e-8}
    assert PRUNE(1.2).settings() == {"transform": "PRUNE", "base": 1.2}
    assert Interpolate(0.5).settings() == {"transform": "Interpolate", "alpha": 0.5}


def test_transforms_follow_one_another() -> None:
    delta, base = some(scale=20.0)
    expected = 0.5 * PRUNE()(RECT(0.5)(delta, base), base)
    assert torch.equal(transformed(delta, base, [RECT(0.5), PRUNE(), Interpolate(0.5)]), expected)


def test_autocast_does_not_reach_the_algebra() -> None:
    delta, base = (value.float() for value in some(scale=50.0))
    expected = PRUNE()(delta, base)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(PRUNE()(delta, base), expected)


@every_transform
@pytest.mark.parametrize(
    ("delta", "base", "message"),
    [
        (torch.ones(3), torch.ones(3), r"delta must be a matrix \(d_out, d_in\), got shape \(3,\)"),
        (torch.ones(3, 2), torch.ones(2, 3), r"base must be of the shape of delta, \(3, 2\), got \(2, 3\)"),
        (torch.ones(3, 2), torch.ones(3, 2, dtype=F64), "one floating type, got torch.float32 and torch.float64"),
        (torch.ones(3, 2).long(), torch.ones(3, 2).long(), "one floating type, got torch.int64"),
    ],
)
def test_what_does_not_fit_is_refused(transform: UpdateTransform, delta: Tensor, base: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transform(delta, base)


@every_transform
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_and_not_cut_out(transform: UpdateTransform, bad: float) -> None:
    delta, base = some()
    delta[1, 2] = bad
    with pytest.raises(FactsError, match="NaN or infinite"):
        transform(delta, base)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (RECT, {"keep": 0.0}, r"keep must be in \(0, 1\], got 0.0"),
        (RECT, {"keep": 1.5}, "keep must be"),
        (RECT, {"keep": math.nan}, "keep must be"),
        (RECT, {"eps": 0.0}, "eps must be positive and finite, got 0.0"),
        (RECT, {"eps": math.inf}, "eps must be"),
        (PRUNE, {"base": 1.0}, "base must be 'e' or a number above 1, got 1.0"),
        (PRUNE, {"base": math.inf}, "base must be"),
        (PRUNE, {"base": "2"}, "base must be"),
        (PRUNE, {"base": True}, "base must be"),
        (Interpolate, {"alpha": -0.1}, r"alpha must be in \[0, 1\], got -0.1"),
        (Interpolate, {"alpha": 1.1}, "alpha must be"),
        (Interpolate, {"alpha": math.nan}, "alpha must be"),
    ],
)
def test_settings_out_of_range_are_refused(kind: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


# ---- norms of weights are computed once ---------------------------------------------------------------------------


def test_the_norm_of_a_weight_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    monkeypatch.setattr(prune, "spectral_norm", lambda base: calls.append(base) or spectral_norm(base))
    transform = PRUNE()
    delta, base = some(scale=50.0)
    first = transform(delta, base)
    assert torch.equal(transform(delta, base.clone()), first)  # editors hand over copies
    assert torch.equal(transform(delta, base.T.contiguous().T), first)
    assert len(calls) == 1
    other = base.clone()
    other[0, 0] += 1
    transform(delta, other)
    assert len(calls) == 2
    PRUNE()(delta, base)  # remembered by each transform for itself
    assert len(calls) == 3


def test_the_memory_of_norms_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune, "_REMEMBERED", 3)
    transform = PRUNE()
    for seed in range(6):
        transform(*some(seed=seed, scale=50.0))
        assert len(vars(transform)["_norms"]) == min(seed + 1, 3)


def test_no_norm_is_computed_for_an_update_that_is_surely_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune, "spectral_norm", lambda base: pytest.fail("not needed"))
    delta, base = some(scale=0.01)
    assert PRUNE()(delta, base) is delta


@MANY
@given(updates())
def test_the_spectral_norm_is_the_largest_singular_value(pair: tuple[Tensor, Tensor]) -> None:
    for matrix in pair:
        expected = float(torch.linalg.svdvals(matrix)[0])
        assert spectral_norm(matrix) == pytest.approx(expected, rel=1e-12, abs=1e-12)


# ---- the share ----------------------------------------------------------------------------------------------------


def test_the_best_share_is_found_and_all_are_told() -> None:
    asked: list[float] = []

    def measure(alpha: float) -> float:
        asked.append(alpha)
        return -((alpha - 0.6) ** 2)

    best, table = search_alpha(measure, [0.9, 0.5, 0.62, 0.5])
    assert best == 0.62
    assert asked == [0.5, 0.62, 0.9]
    assert [alpha for alpha, _ in table] == asked


def test_of_equally_good_shares_the_smallest_is_taken() -> None:
    assert search_alpha(lambda alpha: min(alpha, 0.5), [0.25, 0.5, 0.75, 1.0])[0] == 0.5


def test_shares_that_cannot_be_measured_are_passed_over() -> None:
    values = {0.2: None, 0.4: math.nan, 0.6: -3.0}
    assert search_alpha(values.get, values)[0] == 0.6
    with pytest.raises(ValueError, match="at least one alpha"):
        search_alpha(lambda alpha: None, [0.5])
    with pytest.raises(ValueError, match="grid must hold"):
        search_alpha(lambda alpha: 1.0, [])
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 2"):
        search_alpha(lambda alpha: 1.0, [0.5, 2])


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_finished_run_is_measured_at_shares_and_not_changed(model_type: str) -> None:
    adapter, tokenizer, requests = ModelAdapter(tiny_model(model_type)), tiny_tokenizer(), tiny_requests()
    ledger = EditLedger(adapter, (1, 2))
    generator = torch.Generator().manual_seed(0)
    original = summarise(evaluate_edits(adapter, tokenizer, requests))
    deltas = {n: torch.randn(adapter.shape(n), dtype=F64, generator=generator) for n in ledger.layers}
    ledger.commit([LayerUpdate(n, ledger.names[n], delta) for n, delta in deltas.items()], [])
    edited = summarise(evaluate_edits(adapter, tokenizer, requests))
    before = {name: value.clone() for name, value in adapter.model.state_dict().items()}
    rows = interpolation_rows(ledger, tokenizer, requests, (0.0, 0.3, 1.0))
    assert all(torch.equal(value, before[name]) for name, value in adapter.model.state_dict().items())
    assert [row.alpha for row in rows] == [0.0, 0.3, 1.0]
    for row, summary in ((rows[0], original), (rows[2], edited)):
        found = [row.efficacy, row.generalization, row.locality]
        assert found == [summary[kind]["success"] for kind in ("efficacy", "generalization", "locality")]
        assert row.score == harmonic_score(found)
    ledger.commit(
        [LayerUpdate(n, ledger.names[n], Interpolate(0.3)(d, torch.zeros_like(d))) for n, d in deltas.items()], []
    )
    part = summarise(evaluate_edits(adapter, tokenizer, requests))
    assert rows[1].efficacy == part["efficacy"]["success"]
    assert rows[1].locality == part["locality"]["success"]


def test_measuring_shares_says_what_is_wrong() -> None:
    ledger = EditLedger(ModelAdapter(tiny_model()), (1,))
    with pytest.raises(ValueError, match="requests must hold at least one edit"):
        interpolation_rows(ledger, tiny_tokenizer(), [])
    with pytest.raises(ValueError, match=r"alphas must be in \[0, 1\], got 1.5"):
        interpolation_rows(ledger, tiny_tokenizer(), tiny_requests(), (0.5, 1.5))
    rows = interpolation_rows(ledger, tiny_tokenizer(), tiny_requests()[:1], (0.0, 1.0), "accuracy")
    assert rows[0].efficacy == rows[1].efficacy  # nothing was edited


# ---- norm-anchor scaling ------------------------------------------------------------------------------------------


@st.composite
def targets(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Targets, states and outputs of some edits."""
    rows, count = draw(st.integers(1, 6)), draw(st.integers(0, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    state, output, shift = (torch.randn(rows, count, dtype=F64, generator=generator) for _ in range(3))
    return state + draw(st.sampled_from([0.1, 5.0])) * shift, state, output


@MANY
@given(targets(), st.sampled_from([0.5, 2.0, 20.0]))
def test_anchoring_is_the_textbooks(parts: tuple[Tensor, Tensor, Tensor], rho: float) -> None:
    target, state, output = parts
    found = anchor_targets(target, state, output, rho)
    for column in range(target.shape[1]):
        z, h, v = (part[:, column] for part in parts)
        value = v + (z - h)
        norm = float(value.norm())
        expected = h if norm > 2 * rho else (h - v) + rho * value / norm
        torch.testing.assert_close(found.targets[:, column], expected, **EXACT)
        assert bool(found.dropped[column]) == (norm > 2 * rho)


@MANY
@given(targets(), st.sampled_from([0.5, 2.0, 20.0]))
def test_anchoring_twice_is_anchoring_once(parts: tuple[Tensor, Tensor, Tensor], rho: float) -> None:
    target, state, output = parts
    once = anchor_targets(target, state, output, rho)
    kept = ~once.dropped
    again = anchor_targets(once.targets[:, kept], state[:, kept], output[:, kept], rho)
    torch.testing.assert_close(again.targets, once.targets[:, kept], **EXACT)
    assert not again.dropped.any()
    values = (once.targets - (state - output))[:, kept]
    torch.testing.assert_close(values.norm(dim=0), torch.full_like(values.norm(dim=0), rho), **EXACT)


def test_where_nothing_is_asked_the_output_is_rescaled() -> None:
    state, output = (torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(n)) for n in range(2))
    found = anchor_targets(state, state, output, 100.0)  # z = h0: v* is v0
    torch.testing.assert_close(found.targets, state - output + 100 * output / output.norm(dim=0), **EXACT)


def test_values_of_zero_and_dropping_none() -> None:
    state = torch.ones(3, 2, dtype=F64)
    silent = anchor_targets(0 * state, state, state, 2.0)  # z = h0 - v0: v* is zero
    assert not silent.targets.any()
    assert not silent.dropped.any()
    assert not anchor_targets(1e9 * state, state, state, 1.0, math.inf).dropped.any()
    zeros, exactly = torch.zeros(2, 1), torch.tensor([[2.0], [0.0]])
    assert not anchor_targets(exactly, zeros, zeros, 1.0).dropped.any()  # twice as long is not longer than twice


def test_the_reference_leaves_the_largest_out() -> None:
    norms = [float(n) for n in range(1, 101)]
    assert reference_norm(reversed(norms)) == sum(range(1, 96)) / 95
    assert reference_norm(norms[:19]) == 10.0
    assert reference_norm(norms, drop=0.0) == 50.5
    assert reference_norm([3.0]) == 3.0


def test_anchoring_leaves_its_arguments_alone() -> None:
    parts = [torch.randn(4, 3, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    before = [part.clone() for part in parts]
    result = anchor_targets(*parts, reference=0.1)
    assert result.targets.dtype == torch.float32
    assert result.dropped.all()
    assert torch.equal(result.targets, parts[1])
    assert all(torch.equal(part, copy_) for part, copy_ in zip(parts, before, strict=True))


def test_anchoring_says_what_is_wrong() -> None:
    ones = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"targets must be \(d_model, n\), got shape \(3,\)"):
        anchor_targets(ones[:, 0], ones, ones, 1.0)
    with pytest.raises(ValueError, match=r"outputs must be of the shape of targets, \(3, 2\), got \(2, 3\)"):
        anchor_targets(ones, ones, ones.T, 1.0)
    with pytest.raises(ValueError, match="states must be of the shape"):
        anchor_targets(ones, ones[:1], ones, 1.0)
    for reference in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="reference must be positive and finite"):
            anchor_targets(ones, ones, ones, reference)
    with pytest.raises(ValueError, match="factor must be positive, got 0"):
        anchor_targets(ones, ones, ones, 1.0, 0)
    for setting, message in ({"samples": 0}, "at least 1"), ({"factor": 0.0}, "positive"), ({"drop": 1.0}, r"\[0, 1\)"):
        with pytest.raises(ValueError, match=f"{next(iter(setting))} must be .*{message}"):
            NormAnchor(**setting)
    with pytest.raises(FactsError, match="NaN or infinite"):
        anchor_targets(ones * math.nan, ones, ones, 1.0)
    with pytest.raises(ValueError, match="norms must hold at least one length"):
        reference_norm([])
    with pytest.raises(ValueError, match="norms must be finite and not negative, got -1"):
        reference_norm([1.0, -1.0])
    with pytest.raises(ValueError, match="norms must be finite"):
        reference_norm([1.0, math.nan])
    with pytest.raises(ValueError, match=r"drop must be in \[0, 1\), got 1"):
        reference_norm([1.0], drop=1)
    with pytest.raises(ValueError, match="reference must be positive"):
        reference_norm([0.0, 0.0])
