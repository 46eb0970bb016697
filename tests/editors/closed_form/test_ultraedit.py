"""UltraEdit: what it reads is autograd's, its formulas are the textbook's, and its steps can be repeated and undone."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_edit import EditRequest, EditStream, LanguageModel
from lit_edit.data.datamodule import EditDataModule
from lit_edit.editors.closed_form.ultraedit import UltraEdit
from lit_edit.editors.token_gradients import TokenGradients, collect_gradients
from lit_edit.editors.transforms.interpolate import Interpolate
from lit_edit.editors.transforms.rect import RECT
from lit_edit.errors import ArgumentError
from lit_edit.ledger.edit_ledger import EditLedger, EditRefusedError
from lit_edit.ledger.journal import Journal
from lit_edit.metrics.scoring import score_continuations
from lit_edit.models.adapter import ModelAdapter
from lit_edit.solvers.functional import FactsError
from lit_edit.solvers.lifelong_normalization import (
    RunningMoments,
    merge_moments,
    normalise,
    pseudo_values,
    ridge_increment,
)
from lit_edit.stream.session import EditSession
from lit_edit.testing import TINY_CONFIGS, tiny_model, tiny_requests, tiny_tokenizer
from lit_edit.text.tokens import continuation
from tests.streams import FixedStatistics, make_trainer
from tests.tolerances import assert_near, rounding

F64 = torch.float64
REQUESTS = tiny_requests()
MANY = settings(max_examples=60, deadline=None, database=None, derandomize=True)
SETTINGS: dict[str, Any] = {"layers": [1, 2], "eta": 3e-4}
every_family = pytest.mark.parametrize("model_type", list(TINY_CONFIGS))


def start(
    model_type: str = "llama", dtype: torch.dtype = F64, journal: Path | None = None, **options: Any
) -> EditSession:
    """A session at the end of its journal."""
    language_model = LanguageModel.of(tiny_model(model_type, dtype), tiny_tokenizer())
    file = None if journal is None else str(journal)
    return EditStream(language_model, UltraEdit(**{**SETTINGS, **options}), FixedStatistics(), journal=file).open()


def make(session: EditSession, requests: Sequence[EditRequest] = REQUESTS, batch: int = 2) -> EditSession:
    for first in range(0, len(requests), batch):
        step = requests[first : first + batch]
        proposal = session.propose(step, step)
        if proposal is not None:
            session.apply(proposal)
    return session


def editor_of(session: EditSession) -> UltraEdit:
    assert isinstance(session.editor, UltraEdit)
    return session.editor


def state_of(session: EditSession) -> dict[str, Tensor]:
    """Everything that a second process must arrive at, bit for bit."""
    editor = editor_of(session)
    weights = {name: value.clone() for name, value in session.ledger.adapter.model.state_dict().items()}
    deltas = {f"delta.{name}": value.clone() for name, value in session.ledger.deltas.items()}
    solutions = {f"solution.{layer}": value.clone() for layer, value in editor.sums.items()}
    moments = {
        f"{part}.{name}": torch.as_tensor(value).clone()
        for name, found in editor.moments.items()
        for part, value in vars(found).items()
    }
    return weights | deltas | solutions | moments


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


# ---- formulas -----------------------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Inputs and values of any shape, fewer tokens than inputs or more; inputs may repeat."""
    tokens, d_in, d_out = draw(st.integers(1, 9)), draw(st.integers(1, 7)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    inputs = draw(st.sampled_from([0.1, 1.0, 30.0])) * torch.randn(tokens, d_in, dtype=F64, generator=generator)
    if draw(st.booleans()):
        inputs = inputs[:1].expand(tokens, d_in).clone()
    return inputs, torch.randn(tokens, d_out, dtype=F64, generator=generator)


@MANY
@given(problems(), st.sampled_from([0.5, 1.0, 100.0]))
def test_dual_and_primal_are_the_published_formula(problem: tuple[Tensor, Tensor], ridge: float) -> None:
    inputs, values = problem
    size = inputs.shape[1]
    gram = inputs.T @ inputs + ridge * torch.eye(size, dtype=F64)
    expected = torch.linalg.solve(gram, inputs.T @ values).T
    # Fewer tokens than inputs are solved in the dual form, others in the primal one. Condition up to 1e5.
    torch.testing.assert_close(ridge_increment(inputs, values, ridge), expected, rtol=1e-9, atol=1e-11)


@MANY
@given(problems(), st.sampled_from([0.1, 7.0, 1000.0]))
def test_a_relative_ridge_does_not_depend_on_the_inputs_scale(problem: tuple[Tensor, Tensor], factor: float) -> None:
    inputs, values = problem
    one = ridge_increment(inputs, values, 0.5, "relative") @ inputs.T
    other = ridge_increment(factor * inputs, values, 0.5, "relative") @ (factor * inputs).T
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    mean = float(inputs.square().sum(1).mean())
    torch.testing.assert_close(
        ridge_increment(inputs, values, 0.5 * mean), ridge_increment(inputs, values, 0.5, "relative"), rtol=1e-9, atol=0
    )


@MANY
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(0, 2**31), st.sampled_from([0.0, 1e3]))
def test_moments_of_blocks_are_those_of_two_passes(blocks: list[int], seed: int, offset: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sum(blocks), 4, dtype=F64, generator=generator) + offset
    moments = RunningMoments.none(rows)
    for block in rows.split(blocks):
        before = moments.mean.clone(), moments.squares.clone()
        merged = merge_moments(moments, block)
        assert torch.equal(moments.mean, before[0])
        assert torch.equal(moments.squares, before[1])
        moments = merged
    assert moments.count == len(rows)
    mean = sum(rows) / len(rows)
    torch.testing.assert_close(moments.mean, mean, rtol=1e-12, atol=1e-12)
    if len(rows) > 1:
        variance = sum((row - mean) ** 2 for row in rows) / (len(rows) - 1)
        torch.testing.assert_close(moments.variance, variance, rtol=1e-9, atol=1e-9)
        found = normalise(rows, moments)
        torch.testing.assert_close(found, (rows - mean) / variance.sqrt(), rtol=1e-8, atol=1e-8)


def test_a_single_row_has_no_spread_and_becomes_zero_without_a_warm_up() -> None:
    rows = torch.tensor([[3.0, -2.0, 0.0]], dtype=F64)
    moments = merge_moments(RunningMoments.none(rows), rows)
    assert not moments.variance.any()
    assert normalise(rows, moments).tolist() == [[0.0, 0.0, 0.0]]
    warm = normalise(rows, moments, warm_up=1.0)
    torch.testing.assert_close(warm, torch.tensor([[1.0, -1.0, 0.0]], dtype=F64))  # (x - x/2) / |x/2|
    never_centred = normalise(rows, moments, warm_up=math.inf)
    torch.testing.assert_close(never_centred, rows.sign())


def test_entries_that_never_vary_become_zero_and_not_rounding() -> None:
    rows = torch.full((7, 3), 0.1, dtype=F64)
    rows[:, 2] = torch.arange(7, dtype=F64)
    moments = RunningMoments.none(rows)
    for row in rows:
        moments = merge_moments(moments, row[None])
    found = normalise(rows, moments)
    assert not found[:, :2].any()
    assert found[:, 2].std() == pytest.approx(1.0)


def test_pseudo_values_follow_the_formula() -> None:
    inputs, gradients = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[2.0], [5.0]])
    assert pseudo_values(inputs, gradients, 0.1).tolist() == [[-5.0], [-0.5]]


def test_what_does_not_fit_is_refused() -> None:
    rows, ones = torch.ones(2, 3, dtype=F64), torch.ones(3, 2, dtype=F64)
    moments = merge_moments(RunningMoments.none(rows), rows)
    for wrong in (rows[:, :2], rows[0], rows[:0]):
        with pytest.raises(ValueError, match=r"rows must be \(m, d\) = \(at least 1, 3\), got"):
            merge_moments(moments, wrong)
    with pytest.raises(FactsError, match="rows hold NaN"):
        merge_moments(moments, rows * math.nan)
    with pytest.raises(ValueError, match=r"rows must be \(m, d\) = \(m, 3\), got \(3, 2\)"):
        normalise(ones, moments)
    with pytest.raises(ValueError, match="warm_up must not be negative, got -1"):
        normalise(rows, moments, -1)
    with pytest.raises(ValueError, match=r"gradients must be \(tokens, d_out\) = \(2, d_out\), got \(3, 2\)"):
        pseudo_values(rows, ones, 1.0)
    with pytest.raises(ValueError, match="values must be"):
        ridge_increment(rows, ones)
    with pytest.raises(ValueError, match=r"inputs must be \(tokens, d_in\), got \(3,\)"):
        ridge_increment(rows[0], ones)
    for ridge in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="ridge must be positive and finite"):
            ridge_increment(rows, rows, ridge)
    with pytest.raises(ValueError, match="scale must be 'absolute' or 'relative', got 'other'"):
        ridge_increment(rows, rows, 1.0, "other")  # type: ignore[arg-type]
    with pytest.raises(FactsError, match="inputs hold NaN or infinite"):
        ridge_increment(rows * math.inf, rows)
    assert not ridge_increment(rows[:0], rows[:0]).any()
    assert not ridge_increment(0 * rows, rows, 1.0, "relative").any()


# ---- inputs and gradients -----------------------------------------------------------------------------------------


def rows_of(requests: Sequence[EditRequest]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [continuation(tiny_tokenizer(), r.text, r.target_new) for r in requests]


def by_autograd(model: Any, adapter: ModelAdapter, layers: Sequence[int], row: Any) -> tuple[dict[int, Tensor], ...]:
    """Plain hooks on the model itself, one row at a time, all weights with gradients."""
    prompt, target = row
    ids = torch.tensor([prompt + target[:-1]])
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}

    def hook(layer: int) -> Any:
        def note(module: Any, args: Any, output: Tensor) -> None:
            inputs[layer], outputs[layer] = args[0].detach(), output
            output.retain_grad()

        return note

    handles = [adapter.down_proj(layer).register_forward_hook(hook(layer)) for layer in layers]
    model.requires_grad_(True)
    logits = model(input_ids=ids).logits[0, -len(target) :]
    loss = -torch.log_softmax(logits.double(), -1)[range(len(target)), list(target)].mean()
    loss.backward()
    model.requires_grad_(False)
    model.zero_grad()
    for handle in handles:
        handle.remove()
    keys = {layer: x.reshape(ids.shape[1], -1)[-len(target) :] for layer, x in inputs.items()}
    slopes = {layer: y.grad.reshape(ids.shape[1], -1)[-len(target) :] for layer, y in outputs.items()}  # type: ignore[union-attr]
    return keys, slopes, {0: loss.detach()}


def check_against_autograd(found: TokenGradients, adapter: ModelAdapter, layers: Sequence[int], rows: Any) -> None:
    first, most = 0, rounding(adapter.model.config.model_type)
    for number, row in enumerate(rows):
        keys, slopes, loss = by_autograd(adapter.model, adapter, layers, row)
        own = slice(first, first + len(row[1]))
        assert found.owner[own].tolist() == [number] * len(row[1])
        for layer in layers:
            assert_near(found.inputs[layer][own], keys[layer], most)
            assert_near(found.gradients[layer][own], slopes[layer], most)
        assert_near(found.losses[number], loss[0], most)
        first += len(row[1])
    assert first == len(found.owner)


@every_family
def test_inputs_and_gradients_are_autograds(model_type: str) -> None:
    adapter, rows = ModelAdapter(tiny_model(model_type, F64)), rows_of(REQUESTS)
    assert len({len(prompt) + len(target) for prompt, target in rows}) > 2  # padded
    found = collect_gradients(adapter, rows, (1, 3), pad=0)
    check_against_autograd(found, adapter, (1, 3), rows)
    assert not any(parameter.requires_grad for parameter in adapter.model.parameters())
    assert not any(module._forward_hooks for module in adapter.model.modules())


def test_batches_do_not_matter() -> None:
    adapter, rows = ModelAdapter(tiny_model("gpt2", F64)), rows_of(REQUESTS)
    together = collect_gradients(adapter, rows, (0, 2), pad=0)
    for batch_tokens in (1, 30, 70):
        found = collect_gradients(adapter, rows, (0, 2), pad=7, batch_tokens=batch_tokens)
        for layer in (0, 2):
            assert_near(found.inputs[layer], together.inputs[layer], rounding("gpt2"))
            assert_near(found.gradients[layer], together.gradients[layer], rounding("gpt2"))


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_view_is_read_with_its_weights(model_type: str) -> None:
    model, other = tiny_model(model_type, F64), tiny_model(model_type, F64)
    adapter, edited = ModelAdapter(model), ModelAdapter(other)
    change = torch.randn(adapter.own_weight(2).shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        edited.own_weight(2).add_(change)
    view = adapter.with_weights({adapter.weight_name(2): adapter.own_weight(2) + change})
    found = collect_gradients(view, rows_of(REQUESTS[:2]), (1, 2), pad=0)
    check_against_autograd(found, edited, (1, 2), rows_of(REQUESTS[:2]))


# ---- steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "gptj"])
@pytest.mark.parametrize("per_layer", [False, True])
def test_two_steps_are_the_published_algorithm(model_type: str, per_layer: bool) -> None:
    session = start(model_type, per_layer=per_layer)
    reference = ModelAdapter(tiny_model(model_type, F64))
    seen: dict[int, list[Tensor]] = {0: []} if not per_layer else {1: [], 2: []}
    total = {layer: torch.zeros(reference.shape(layer), dtype=F64) for layer in (1, 2)}
    for step in (REQUESTS[:2], REQUESTS[2:5]):
        make(session, step, len(step))
        parts = [by_autograd(reference.model, reference, (1, 2), row)[:2] for row in rows_of(step)]
        inputs = {n: torch.cat([keys[n] for keys, _ in parts]) for n in (1, 2)}
        slopes = {n: torch.cat([grads[n] for _, grads in parts]) for n in (1, 2)}
        for layer in (1, 2):
            seen[layer if per_layer else 0].append(torch.cat([inputs[layer], slopes[layer]], 1))
        for layer in (1, 2):
            history = torch.cat(seen[layer if per_layer else 0])
            rows = torch.cat([inputs[layer], slopes[layer]], 1)
            deviation = history.std(0)
            hat = torch.where(deviation > 0, (rows - history.mean(0)) / deviation, torch.zeros_like(rows))
            width = inputs[layer].shape[1]
            values = -SETTINGS["eta"] * (hat[:, :width] ** 2).sum(1, keepdim=True) * hat[:, width:]
            gram = inputs[layer].T @ inputs[layer] + torch.eye(width, dtype=F64)
            delta = torch.linalg.solve(gram, inputs[layer].T @ values).T
            total[layer] += delta
            with torch.no_grad():
                reference.own_weight(layer).add_(reference.to_layout(layer, delta))
    for layer in (1, 2):
        found = session.ledger.deltas[session.ledger.names[layer]]
        # Dividing by the standard deviations of a few tokens magnifies what rounding did.
        assert_near(found, total[layer], 10 * rounding(model_type))
        assert float(found.norm()) > 1e-4


def test_steps_make_targets_likelier() -> None:
    session = start(eta=1e-4)
    adapter, pairs = session.ledger.adapter, [(r.text, r.target_new) for r in REQUESTS]
    before = sum(score.nll for score in score_continuations(adapter, tiny_tokenizer(), pairs))
    make(session, batch=6)
    assert sum(score.nll for score in score_continuations(adapter, tiny_tokenizer(), pairs)) < before


def test_proposing_changes_nothing() -> None:
    session = make(start(), REQUESTS[:2])
    before = state_of(session)
    proposal = session.propose(REQUESTS[2:4], REQUESTS[2:4])
    assert proposal is not None
    assert_same(state_of(session), before)
    session.apply(proposal)
    after = state_of(session)
    assert int(after["count.32x48"]) > int(before["count.32x48"])
    assert [sorted(entry.facts) for entry in proposal.entries] == [["target_loss", "target_probability_before"]] * 2


def test_a_single_edit_of_a_single_token() -> None:
    """The variance of one row is zero, not NaN; the published step is then nothing, with a warm-up it is one."""
    words = [word for r in REQUESTS for word in (r.target_new, r.target_true, r.subject) if word]
    target = next(word for word in words if len(continuation(tiny_tokenizer(), REQUESTS[0].text, word)[1]) == 1)
    one = EditRequest("x", REQUESTS[0].prompt, REQUESTS[0].subject, target)
    cold, warm = start(layers=[1]), start(layers=[1], warm_up=10.0)
    for session in (cold, warm):
        make(session, [one], 1)
        assert editor_of(session).moments["32x48"].count == 1
    assert not next(iter(cold.ledger.deltas.values())).any()
    assert next(iter(warm.ledger.deltas.values())).any()


def test_half_precision_models_and_frozen_weights() -> None:
    session = make(start("llama", torch.bfloat16), REQUESTS[:4])
    editor = editor_of(session)
    assert all(moments.mean.dtype == F64 for moments in editor.moments.values())
    assert all(delta.dtype == F64 for delta in session.ledger.deltas.values())


def test_what_diverges_is_refused_and_changes_nothing() -> None:
    session = start(dtype=torch.float32, eta=1e300)
    before = state_of(session)
    with pytest.raises((EditRefusedError, FactsError)):
        make(session, REQUESTS[:2])
    assert_same(state_of(session), before)


# ---- again, out and back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transforms", [(), (RECT(0.3), Interpolate(0.8))], ids=["plain", "transformed"])
def test_a_journal_is_done_again_bit_for_bit(
    model_type: str, dtype: torch.dtype, transforms: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    session = start(model_type, dtype, tmp_path / "journal", transforms=transforms)
    make(session)
    session.undo([2])
    session.undo([3, 4])
    session.redo([3])
    expected = state_of(session)
    with caplog.at_level(logging.WARNING):
        again = start(model_type, dtype, tmp_path / "journal", transforms=transforms)
        assert_same(state_of(again), expected)
    assert not caplog.records


def test_a_run_that_died_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    expected = state_of(make(start(), REQUESTS))
    for cut in (2, 4):
        folder = tmp_path / f"journal-{cut}"
        make(start(journal=folder), REQUESTS[:cut])
        again = start(journal=folder)
        make(again, REQUESTS)
        assert_same(state_of(again), expected)


@pytest.mark.parametrize("transforms", [(), (RECT(0.3),)], ids=["plain", "transformed"])
@pytest.mark.parametrize("per_layer", [False, True])
def test_a_saved_state_goes_on_as_if_never_saved(transforms: Any, per_layer: bool) -> None:
    options: dict[str, Any] = {"transforms": transforms, "per_layer": per_layer}
    expected = state_of(make(start(**options), REQUESTS))
    first = make(start(**options), REQUESTS[:4])
    ledger_state, editor_state = first.ledger.state_dict(), first.editor.state_dict()
    second = start(**options)
    second.editor.check_state(editor_state, second.ledger.layers)
    second.ledger.load_state_dict(ledger_state)
    second.editor.load_state_dict(editor_state)
    make(second, REQUESTS[4:])
    assert_same(state_of(second), expected)


@pytest.mark.parametrize("batch", [1, 2])
def test_what_is_taken_out_leaves_the_rest_of_the_steps(batch: int) -> None:
    session = make(start(), REQUESTS[:4], batch)
    facts = {n: session.ledger.facts_of([n])[0] for n in (1, 2, 3, 4)}
    alone = editor_of(session)._increments
    numbers = [3, 4] if batch == 2 else [4]
    before = dict(session.ledger.deltas)
    session.undo(numbers)
    step = alone(facts[4].tensors)  # all of the step
    for layer, name in session.ledger.names.items():
        torch.testing.assert_close(session.ledger.deltas[name], before[name] - step[layer], rtol=1e-12, atol=1e-15)


def test_a_part_of_a_step_is_taken_out_as_if_the_rest_had_been_solved_without_it() -> None:
    session = make(start(), REQUESTS[:3], 3)
    tensors = session.ledger.facts_of([2])[0].tensors
    session.undo([2])
    expected = editor_of(session)._increments(tensors, [0, 2])
    whole = editor_of(session)._increments(tensors)
    for layer, name in session.ledger.names.items():
        torch.testing.assert_close(session.ledger.deltas[name], expected[layer], rtol=1e-10, atol=1e-14)
        assert float((whole[layer] - expected[layer]).norm()) > 1e-3 * float(whole[layer].norm())
    session.redo([2])
    for layer, name in session.ledger.names.items():
        torch.testing.assert_close(session.ledger.deltas[name], whole[layer], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("order", [[1, 2, 3, 4], [4, 1, 3, 2]])
def test_taking_everything_out_leaves_the_original_and_putting_it_back_the_edits(order: list[int]) -> None:
    session = make(start("gpt2"), REQUESTS[:4])
    original = {name: value.clone() for name, value in session.ledger.base.items()}
    edited = {name: value.clone() for name, value in session.ledger.deltas.items()}
    for number in order:
        session.undo([number])
    for layer, name in session.ledger.names.items():
        assert torch.equal(session.ledger.adapter.own_weight(layer), original[name])
        assert not session.ledger.deltas[name].any()
    for number in reversed(order):
        session.redo([number])
    for name, delta in session.ledger.deltas.items():
        torch.testing.assert_close(delta, edited[name], rtol=1e-10, atol=1e-14)


def test_an_edit_of_the_same_fact_replaces_the_earlier_one() -> None:
    session = make(start(), REQUESTS[:2])
    again = EditRequest("again", REQUESTS[0].prompt, REQUESTS[0].subject, "Oslo")
    make(session, [again], 1)
    assert sorted(session.ledger.history.undone) == [1]
    other = make(start(), REQUESTS[:2])
    other.undo([1])
    make(other, [again], 1)
    for name, delta in session.ledger.deltas.items():
        torch.testing.assert_close(delta, other.ledger.deltas[name], rtol=1e-9, atol=1e-13)


def test_later_edits_cannot_be_made_again() -> None:
    session = make(start(), REQUESTS[:2], 1)
    assert not session.editor.exact_undo
    with pytest.raises(ArgumentError, match="cannot make later edits again"):
        session.undo([1], exact=True)


# ---- settings and state -------------------------------------------------------------------------------------------


def test_settings_tell_all_and_are_compared(tmp_path: Path) -> None:
    session = make(start(journal=tmp_path / "journal", transforms=(RECT(0.5),)), REQUESTS[:2])
    assert session.editor.settings() == {
        "editor": "UltraEdit",
        "layers": [1, 2],
        "eta": 3e-4,
        "ridge": 1.0,
        "ridge_scale": "absolute",
        "warm_up": 0.0,
        "per_layer": False,
        "transforms": [{"transform": "RECT", "keep": 0.5, "eps": 1e-8}],
    }
    for name, value in (("eta", 1e-5), ("warm_up", 3.0), ("transforms", ()), ("per_layer", True)):
        with pytest.raises(ArgumentError, match=name):
            start(journal=tmp_path / "journal", **{"transforms": (RECT(0.5),), name: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": []}, "layers must be ascending"),
        ({"layers": [2, 1]}, r"layers must be ascending, different and not negative, got \[2, 1\]"),
        ({"eta": 0.0}, "eta must be positive and finite, got 0.0"),
        ({"eta": math.inf}, "eta must be"),
        ({"ridge": -1.0}, "ridge must be positive and finite, got -1.0"),
        ({"ridge_scale": "both"}, "ridge_scale must be 'absolute' or 'relative', got 'both'"),
        ({"warm_up": -1.0}, "warm_up must not be negative or infinite, got -1.0"),
        ({"warm_up": math.inf}, "warm_up must not be"),
    ],
)
def test_settings_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UltraEdit(**arguments)


def test_layers_that_do_not_exist_are_refused() -> None:
    adapter = ModelAdapter(tiny_model())
    assert UltraEdit().resolve_layers(adapter) == (2, 3)
    for depth, layers in ((1, (0,)), (2, (1,)), (30, tuple(range(18, 25)))):
        assert UltraEdit().resolve_layers(ModelAdapter(tiny_model(num_hidden_layers=depth))) == layers
    with pytest.raises(ArgumentError, match="layer 9 does not exist"):
        UltraEdit(layers=[9]).resolve_layers(adapter)


def test_states_of_others_are_refused() -> None:
    session = make(start(), REQUESTS[:2])
    state = session.editor.state_dict()
    assert session.editor.check_state(state, (1, 2)) is None
    with pytest.raises(ArgumentError, match="another editing method"):
        session.editor.check_state({"solvers": {}}, (1, 2))
    with pytest.raises(ArgumentError, match=r"edits layers \[1, 2\], this editor \[1, 3\]"):
        session.editor.check_state(state, (1, 3))
    with pytest.raises(ArgumentError, match="per_layer=False, this editor has True"):
        UltraEdit(per_layer=True).check_state(state, (1, 2))
    with pytest.raises(ArgumentError, match="other transforms"):
        UltraEdit(transforms=(RECT(),)).check_state(state, (1, 2))


def test_two_editors_know_nothing_of_each_other() -> None:
    one = make(start(), REQUESTS[:2])
    other = start()
    assert not editor_of(other).moments
    ledger = EditLedger(one.ledger.adapter, (1, 2), Journal(), adopt=True)
    one.editor.prepare(ledger, tiny_tokenizer(), FixedStatistics())
    assert not editor_of(one).moments


def test_a_whole_stream_on_a_trainer(tmp_path: Path) -> None:
    data = EditDataModule.from_requests(REQUESTS, batch_size=3)
    data.perplexity_texts = ["A plain sentence of some words."]
    language_model = LanguageModel.of(tiny_model("gpt2", torch.float32), tiny_tokenizer())
    stream = EditStream(language_model, UltraEdit(**SETTINGS), FixedStatistics())
    make_trainer(tmp_path).fit(stream, datamodule=data)
    assert len(stream.ledger) == 6
    assert all(delta.any() for delta in stream.ledger.deltas.values())
