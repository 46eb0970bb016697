"""Rows run as one line against the models themselves: each row alone, without padding, through the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lit_edit.models import ModelAdapter
from lit_edit.models import packed as packed_module
from lit_edit.models.described import check_passes
from lit_edit.models.packed import Line, TokenRows, allowed_positions
from lit_edit.models.packed_attention import packed_attention
from lit_edit.models.structure import UnknownArchitectureError, find_spec
from lit_edit.testing import TINY_CONFIGS, tiny_model

LAYERS = 4
MIDDLE = 2
BOTH_KINDS = ["sliding_attention", "full_attention"] * 2
PLAIN = {
    f"{family}-{attention}-{dtype}": (family, {"attn_implementation": attention, "dtype": getattr(torch, dtype)})
    for family in sorted(TINY_CONFIGS)
    for attention in (("eager",) if family in ("gptj", "gemma2") else ("sdpa", "eager"))  # those have eager only
    for dtype in ("float64", "float32")
}
SPECIAL: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2-window": ("gemma2", {"sliding_window": 3}),
    "gemma3-window": ("gemma3_text", {"sliding_window": 3}),
    "gemma3-window-eager": ("gemma3_text", {"sliding_window": 3, "attn_implementation": "eager"}),
    "gemma3-windows-of-both-kinds": ("gemma3_text", {"sliding_window": 3, "layer_types": BOTH_KINDS}),
    "mistral-window": ("mistral", {"sliding_window": 2}),
    "phi3-window": ("phi3", {"sliding_window": 3}),
    "qwen2-window": ("qwen2", {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 2}),
    "gpt2-upcast": ("gpt2", {"reorder_and_upcast_attn": True}),
    "gpt2-scaled": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2-unscaled": ("gpt2", {"scale_attn_weights": False}),
    "opt-projected": ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "llama-one-key-head": ("llama", {"num_key_value_heads": 1}),
    "llama-all-key-heads": ("llama", {"num_key_value_heads": 4}),
}
CASES = PLAIN | SPECIAL
DOUBLE = [name for name in CASES if not name.endswith("float32")]
ONE_BLOCK = ["gpt2-sdpa-float64", "llama-eager-float64", "gemma3-windows-of-both-kinds", "gptj-eager-float64"]
MANY, ONE = 0, 10**6  # what one more block costs: as many blocks as there are lengths, or one


def in_blocks(names: Sequence[str]) -> pytest.MarkDecorator:
    """All in many blocks, some in one as well."""
    cases = [(name, MANY) for name in names] + [(name, ONE) for name in ONE_BLOCK]
    ids = [f"{name}-{'many-blocks' if overhead == MANY else 'one-block'}" for name, overhead in cases]
    return pytest.mark.parametrize(("name", "overhead"), cases, ids=ids)


in_double = pytest.mark.parametrize("name", DOUBLE)


def _random(length: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, 400, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


A, B = _random(12, 5), _random(9, 6)
# The longest, not first, exceeds the sliding windows; one twice, one that begins others, some that part from others.
ROWS = (A[:5] + B[:4], A, A[:5], A, B[:8], A[:3] + B[3:7], B[:1], A[:5] + B[:2], _random(7, 7))
STARTS = (5, 4, 2, 3, 0, 3, 0, 1, 6)  # in the middle, the first, the last token


def packs(name: str) -> bool:
    return not name.startswith("gptj") and name != "gpt2-upcast"


def tolerance(name: str) -> dict[str, float]:
    """float64 all the way with LayerNorm and sdpa; RMSNorm, rotary tables and eager softmax round to float32."""
    exact = name.startswith(("gpt2", "gpt_neox", "opt")) and not name.endswith(("float32", "eager-float64"))
    return {"rtol": 1e-10, "atol": 1e-10} if exact else {"rtol": 2e-5, "atol": 2e-5}


def build(name: str) -> ModelAdapter:
    family, changes = CASES[name]
    return ModelAdapter(tiny_model(family, **{"dtype": torch.float64, **changes}))


load = cache(build)


def listen(adapter: ModelAdapter, hook: Any) -> list[Any]:
    return [
        layer.register_forward_pre_hook(partial(hook, index), with_kwargs=True)
        for index, layer in enumerate(adapter.layers)
    ]


@cache
@torch.no_grad()
def alone(name: str, row: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """States ``(1 + layers, length, d_model)`` and logits of a row by itself."""
    adapter, states = load(name), []

    def read(index: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        states.append((args[0] if args else kwargs["hidden_states"])[0])

    handles = listen(adapter, read)
    handles.append(
        adapter.layers[-1].register_forward_hook(
            lambda module, args, output: states.append((output[0] if isinstance(output, tuple) else output)[0])
        )
    )
    logits = adapter.model(input_ids=torch.tensor([row]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return torch.stack(states), logits


def of_row(line: Line, values: Tensor, row: int, start: int, stop: int) -> Tensor:
    return values[[line.index(row, position) for position in range(start, stop)]]


def check_states(
    name: str, line: Line, values: Tensor, layers: int, chosen: Sequence[int], starts: Sequence[int]
) -> None:
    """The states behind so many layers are those of the rows alone, from the starts on."""
    found = [of_row(line, values, row, starts[row], len(ROWS[row])) for row in chosen]
    expected = [alone(name, ROWS[row])[0][layers, starts[row] :] for row in chosen]
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), **tolerance(name))


def prefixes(rows: Sequence[Sequence[int]], starts: Sequence[int] | None = None) -> set[tuple[int, ...]]:
    """All distinct beginnings of rows that end at the start or behind it."""
    begin = starts or [0] * len(rows)
    return {tuple(row[: end + 1]) for row, start in zip(rows, begin, strict=True) for end in range(start, len(row))}


# ---- whole passes ----------------------------------------------------------------------------------------------------


@in_blocks(list(CASES))
@torch.no_grad()
def test_states_behind_each_layer_are_those_of_the_rows_alone(
    name: str, overhead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_module, "_BLOCK_OVERHEAD", overhead)
    adapter = load(name)
    line = TokenRows(adapter, ROWS, 0).line()
    assert (len(line._blocks) > 2) == (overhead == MANY)
    states = line.hidden
    for layers in range(LAYERS + 1):
        states = line.run(states, layers - 1, layers) if layers else states
        check_states(name, line, states, layers, range(len(ROWS)), [0] * len(ROWS))
    torch.testing.assert_close(line.run(line.hidden, 0, LAYERS), states, rtol=0, atol=0)
    logits = adapter.logits(adapter.finish(states))
    found = torch.cat([of_row(line, logits, row, 0, len(ids)) for row, ids in enumerate(ROWS)])
    expected = torch.cat([alone(name, ids)[1] for ids in ROWS])
    torch.testing.assert_close(found, expected, **tolerance(name))


def test_the_rows_differ_where_they_should() -> None:
    """What the comparisons in this file rest on."""
    states = [alone("gpt2-sdpa-float64", row)[0] for row in ROWS]
    assert (states[1][LAYERS, 5] - states[0][LAYERS, 5]).abs().max() > 0.1
    windows = [alone(name, A)[0][LAYERS, -1] for name in ("mistral-sdpa-float64", "mistral-window")]
    assert (windows[0] - windows[1]).abs().max() > 1e-3


@in_double
@torch.no_grad()
def test_rows_share_exactly_what_they_have_in_common(name: str) -> None:
    rows = TokenRows(load(name), ROWS, 0)
    line = rows.line()
    assert load(name).packs == packs(name)
    assert [len(path) for path in rows.paths] == [len(row) for row in ROWS]
    expected = len(prefixes(ROWS)) if packs(name) else sum(map(len, ROWS))
    assert len(line) == len(rows.hidden) == expected == len(set(line.nodes.tolist()))
    if packs(name):
        node_of = {row[: i + 1]: n for row, path in zip(ROWS, rows.paths, strict=True) for i, n in enumerate(path)}
        for row, path in zip(ROWS, rows.paths, strict=True):
            assert path == [node_of[row[: i + 1]] for i in range(len(row))]
        assert len(set(node_of.values())) == len(node_of)


@pytest.mark.parametrize("name", ["gpt2-sdpa-float64", "llama-eager-float64", "gptj-eager-float64"])
@torch.no_grad()
def test_rows_share_no_further_than_they_may(name: str) -> None:
    rows = TokenRows(load(name), ROWS, 0, share=STARTS)
    common = prefixes([row[:start] for row, start in zip(ROWS, STARTS, strict=True)])
    own = sum(len(row) - start for row, start in zip(ROWS, STARTS, strict=True))
    assert len(rows.hidden) == (own + len(common) if packs(name) else sum(map(len, ROWS)))
    tails = [node for path, start in zip(rows.paths, STARTS, strict=True) for node in path[start:]]
    assert len(set(tails)) == len(tails)
    line = rows.line()
    check_states(name, line, line.run(line.hidden, 0, LAYERS), LAYERS, range(len(ROWS)), [0] * len(ROWS))


@torch.no_grad()
def test_a_line_of_some_rows_in_any_order() -> None:
    name = "llama-sdpa-float64"
    rows = TokenRows(load(name), ROWS, 0)
    for chosen in ([7, 2, 0], [6], [3, 0, 3]):
        line = rows.line(chosen)
        assert len(line) == len(prefixes([ROWS[row] for row in chosen]))
        check_states(name, line, line.run(line.hidden, 0, LAYERS), LAYERS, chosen, [0] * len(ROWS))


@pytest.mark.parametrize("name", ["gpt2-sdpa-float64", "llama-sdpa-float64", "mistral-window", "gemma2-window"])
@torch.no_grad()
def test_rows_too_long_for_the_formula(name: str) -> None:
    """Blocks of more than 128 tokens a row are left to the fused kernel."""
    family, changes = CASES[name]
    length = {"n_positions" if family == "gpt2" else "max_position_embeddings": 256}
    adapter = ModelAdapter(tiny_model(family, **{"dtype": torch.float64, **changes, **length}))
    long = _random(150, 8)
    rows = (long, long[:30] + _random(140, 9), long[:10])
    line = TokenRows(adapter, rows, 0).line()
    logits = adapter.logits(adapter.finish(line.run(line.hidden, 0, LAYERS)))
    for number, row in enumerate(rows):
        expected = adapter.model(input_ids=torch.tensor([row])).logits[0]
        torch.testing.assert_close(of_row(line, logits, number, 0, len(row)), expected, **tolerance(name))


# ---- from the middle -------------------------------------------------------------------------------------------------


@torch.no_grad()
def split(
    rows: TokenRows, starts: Sequence[int], layer: int, stop: int = LAYERS
) -> tuple[Line, Tensor, Line, dict[int, tuple[Tensor, Tensor]]]:
    """The whole line with its states entering ``layer``, and what comes before the starts, run and kept."""
    whole = rows.line()
    states = whole.run(whole.hidden, 0, layer)
    before = rows.line(stops=starts)
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    before.run(whole.carry(states, before), layer, stop, keep=kept)
    return whole, states, before, kept


@in_blocks(list(CASES))
@torch.no_grad()
def test_a_pass_from_the_middle_is_the_rest_of_the_whole(
    name: str, overhead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_module, "_BLOCK_OVERHEAD", overhead)
    rows = TokenRows(load(name), ROWS, 0, share=STARTS)
    whole, states, before, kept = split(rows, STARTS, MIDDLE)
    assert sorted(kept) == [2, 3]
    for chosen in (range(len(ROWS)), [2, 0, 4], [6], [8, 1], [3, 0]):
        after = rows.line(chosen, [STARTS[row] for row in chosen], behind=before)
        assert len(after) == sum(len(ROWS[row]) - STARTS[row] for row in chosen)
        result = after.run(whole.carry(states, after), MIDDLE, LAYERS, kept)
        check_states(name, after, result, LAYERS, chosen, STARTS)


@in_blocks(DOUBLE)
@torch.no_grad()
def test_a_pass_from_the_middle_of_a_common_beginning(
    name: str, overhead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the start rows still share: what comes before is partly kept, partly run by another row."""
    monkeypatch.setattr(packed_module, "_BLOCK_OVERHEAD", overhead)
    rows = TokenRows(load(name), ROWS, 0)
    starts = [min(2, len(row)) for row in ROWS]
    whole, states, before, kept = split(rows, starts, 0)
    after = rows.line(starts=starts, behind=before)
    if packs(name):
        assert len(after) == len(prefixes(ROWS, starts))
        assert any(block.shares for block in after._blocks)
    result = after.run(whole.carry(states, after), 0, LAYERS, kept)
    check_states(name, after, result, LAYERS, range(len(ROWS)), starts)


@pytest.mark.parametrize("name", ["gpt2-sdpa-float64", "gptj-eager-float64"])
@pytest.mark.parametrize("starts", [(0, 2, 2), (2, 0, 2), (2, 2, 0), (3, 1, 0)])
@torch.no_grad()
def test_rows_that_share_tokens_may_start_apart(name: str, starts: tuple[int, ...]) -> None:
    """A token that one row asks for is in the line, whichever rows have it behind them."""
    rows = TokenRows(load(name), ROWS[:3], 0)
    whole, states, before, kept = split(rows, starts, 1)
    after = rows.line(starts=starts, behind=before)
    result = after.run(whole.carry(states, after), 1, LAYERS, kept)
    check_states(name, after, result, LAYERS, range(3), starts)


@pytest.mark.parametrize("name", ["gpt2-sdpa-float64", "gptj-eager-float64"])
@torch.no_grad()
def test_rows_may_stop_early(name: str) -> None:
    line = TokenRows(load(name), ROWS, 0).line(stops=STARTS)
    states = line.run(line.hidden, 0, LAYERS)
    for row, stop in enumerate(STARTS):
        found = of_row(line, states, row, 0, stop)
        torch.testing.assert_close(found, alone(name, ROWS[row])[0][LAYERS, :stop], **tolerance(name))
    distinct = prefixes([row[:stop] for row, stop in zip(ROWS, STARTS, strict=True)])
    assert len(line) == (len(distinct) if packs(name) else sum(STARTS))


@torch.no_grad()
def test_values_are_carried_to_where_the_other_line_has_them() -> None:
    rows = TokenRows(load("gpt2-sdpa-float64"), ROWS, 0)
    whole = rows.line()
    for other in (rows.line([7, 2, 0]), rows.line(stops=STARTS), rows.line(starts=[1] * len(ROWS), behind=whole)):
        torch.testing.assert_close(whole.carry(whole.nodes, other), other.nodes, rtol=0, atol=0)
        torch.testing.assert_close(whole.carry(whole.hidden, other), other.hidden, rtol=0, atol=0)


# ---- gradients -------------------------------------------------------------------------------------------------------


def weights_of(name: str, row: int) -> Tensor:
    """What the logits of a row weigh in the loss."""
    generator = torch.Generator().manual_seed(row)
    return torch.randn(len(ROWS[row]), 400, generator=generator, dtype=load(name).dtype)


def moved(name: str, row: int) -> Tensor:
    """A vector at the start of a row, zeros elsewhere."""
    delta = torch.zeros(len(ROWS[row]), 32, dtype=load(name).dtype)
    delta[STARTS[row]] = torch.randn(32, generator=torch.Generator().manual_seed(row), dtype=delta.dtype)
    return delta


def plain_gradient(name: str, row: int, delta: Tensor) -> Tensor:
    """Gradient of a row's loss by ``delta`` ``(length, d_model)``, added to what enters the middle layer."""
    adapter, delta = load(name), delta.clone().requires_grad_()

    def move(module: nn.Module, args: tuple, kwargs: dict) -> Any:
        if args:
            return (args[0] + delta, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"] + delta}

    handle = adapter.layers[MIDDLE].register_forward_pre_hook(move, with_kwargs=True)
    logits = adapter.model(input_ids=torch.tensor([ROWS[row]]), use_cache=False).logits[0]
    handle.remove()
    return torch.autograd.grad((logits * weights_of(name, row)).sum(), delta)[0]


def by_token(line: Line, gradients: Sequence[Tensor], like: Tensor) -> Tensor:
    """Sums of the rows' gradients, for each token of a line."""
    total = torch.zeros_like(like)
    for row, gradient in enumerate(gradients):
        total.index_add_(0, torch.tensor([line.index(row, position) for position in range(len(ROWS[row]))]), gradient)
    return total


def line_loss(name: str, line: Line, hidden: Tensor, starts: Sequence[int], kept: Any = None) -> Tensor:
    adapter = load(name)
    logits = adapter.logits(adapter.finish(line.run(hidden, MIDDLE, LAYERS, kept)))
    parts = [
        of_row(line, logits, row, starts[row], len(ids)) * weights_of(name, row)[starts[row] :]
        for row, ids in enumerate(ROWS)
    ]
    return torch.cat(parts).sum()


def close_gradients(name: str, found: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().item()
    assert scale > 0.1
    torch.testing.assert_close(found / scale, expected / scale, **tolerance(name))


@in_blocks(DOUBLE)
def test_gradients_are_those_of_the_full_pass(name: str, overhead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vector is added at the start of each row; what comes before is shared, or kept from an earlier pass."""
    monkeypatch.setattr(packed_module, "_BLOCK_OVERHEAD", overhead)
    plain = [plain_gradient(name, row, moved(name, row)) for row in range(len(ROWS))]
    expected = torch.stack([gradient[start] for gradient, start in zip(plain, STARTS, strict=True)])
    delta = torch.stack([moved(name, row)[start] for row, start in enumerate(STARTS)])

    rows = TokenRows(load(name), ROWS, 0, share=STARTS)
    whole, states, before, kept = split(rows, STARTS, MIDDLE)
    after = rows.line(starts=STARTS, behind=before)
    for line, starts, keys in ((after, STARTS, kept), (whole, [0] * len(ROWS), None)):
        assert (len(line._blocks) > 1) == (overhead == MANY)
        at = torch.tensor([line.index(row, start) for row, start in enumerate(STARTS)])
        leaves = [delta.clone().requires_grad_(), whole.carry(states, line).requires_grad_()]
        loss = line_loss(name, line, leaves[1].index_add(0, at, leaves[0]), starts, keys)
        by_delta, by_state = torch.autograd.grad(loss, leaves)
        close_gradients(name, by_delta, expected)
        close_gradients(name, by_state, whole.carry(by_token(whole, plain, states), line))


@in_blocks(["opt-sdpa-float64", "gemma2-window", "mistral-window"])
def test_gradients_of_shared_states_are_sums_over_their_rows(
    name: str, overhead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_module, "_BLOCK_OVERHEAD", overhead)
    line = TokenRows(load(name), ROWS, 0).line()
    with torch.no_grad():
        states = line.run(line.hidden, 0, MIDDLE)
    plain = [plain_gradient(name, row, torch.zeros_like(moved(name, row))) for row in range(len(ROWS))]
    leaf = states.clone().requires_grad_()
    loss = line_loss(name, line, leaf, [0] * len(ROWS))
    close_gradients(name, torch.autograd.grad(loss, leaf)[0], by_token(line, plain, states))


# ---- keys and views --------------------------------------------------------------------------------------------------


@in_double
@torch.no_grad()
def test_keys_are_those_that_the_adapter_reads(name: str) -> None:
    adapter = load(name)
    line = TokenRows(adapter, ROWS, 0).line()
    keys: dict[int, Tensor] = {}
    states = line.run(line.hidden, 0, LAYERS, keys=keys)
    torch.testing.assert_close(states, line.run(line.hidden, 0, LAYERS), rtol=0, atol=0)
    assert list(keys) == list(range(LAYERS))
    assert all(values.shape == (len(line), adapter.shape(layer)[1]) for layer, values in keys.items())
    tokens = [torch.tensor([ids]) for ids in ROWS]
    alone_keys = [adapter.read_keys(ids, torch.ones_like(ids), range(LAYERS)) for ids in tokens]
    for layer, values in keys.items():
        found = torch.cat([of_row(line, values, row, 0, len(ids)) for row, ids in enumerate(ROWS)])
        torch.testing.assert_close(found, torch.cat([read[layer][0] for read in alone_keys]), **tolerance(name))


@in_double
@torch.no_grad()
def test_a_line_runs_on_other_weights_when_it_is_told_to(name: str) -> None:
    adapter = load(name)
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for weight_name in (adapter.weight_name(1), adapter.weight_name(2)):
        weight = adapter.model.get_parameter(weight_name)
        weights[weight_name] = weight + 0.3 * torch.randn(weight.shape, generator=generator).to(weight)
    view = adapter.with_weights(weights)
    rows = TokenRows(adapter, ROWS, 0, share=STARTS)
    line = rows.line()
    own = line.run(line.hidden, 0, LAYERS)
    keys: dict[int, Tensor] = {}
    found = adapter.finish(line.run(line.hidden, 0, LAYERS, keys=keys, adapter=view))
    before = rows.line(stops=STARTS)
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    before.run(before.hidden, 0, LAYERS, keep=kept, adapter=view)
    after = rows.line(starts=STARTS, behind=before)
    rest = adapter.finish(after.run(after.hidden, 0, LAYERS, kept, adapter=view))
    for row, (ids, start) in enumerate(zip(ROWS, STARTS, strict=True)):
        tokens = torch.tensor([ids])
        with view.record_keys([3]) as read:
            expected = view.last_hidden(tokens, torch.ones_like(tokens))[0]
        torch.testing.assert_close(of_row(line, found, row, 0, len(ids)), expected, **tolerance(name))
        torch.testing.assert_close(of_row(after, rest, row, start, len(ids)), expected[start:], **tolerance(name))
        found_keys = of_row(line, keys[3], row, 0, len(ids))
        torch.testing.assert_close(found_keys, read[3].reshape(found_keys.shape), **tolerance(name))
    torch.testing.assert_close(line.run(line.hidden, 0, LAYERS), own, rtol=0, atol=0)
    assert (adapter.finish(own) - found).abs().max() > 1e-2


# ---- what is left behind ---------------------------------------------------------------------------------------------


def attention_names(adapter: ModelAdapter) -> list[str]:
    configs = [adapter.model.config, *(m.config for m in adapter.model.modules() if hasattr(m, "config"))]
    return [config._attn_implementation for config in configs]


@in_double
@torch.no_grad()
def test_the_models_attention_is_restored(name: str) -> None:
    adapter = build(name)
    before, during = attention_names(adapter), []
    ids = torch.tensor([A])
    logits = adapter.model(input_ids=ids).logits
    line = TokenRows(adapter, ROWS, 0).line()

    def look(index: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        during.extend(attention_names(adapter))
        if fail and index == 2:
            raise RuntimeError("inside")

    handles = listen(adapter, look)
    fail = False
    line.run(line.hidden, 0, LAYERS)
    assert attention_names(adapter) == before
    assert set(during) == ({"lit_edit_packed"} if packs(name) else {before[0]})
    fail = True
    with pytest.raises(RuntimeError, match="inside"):
        line.run(line.hidden, 0, LAYERS)
    for handle in handles:
        handle.remove()
    assert attention_names(adapter) == before
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in adapter.model.modules())
    torch.testing.assert_close(adapter.model(input_ids=ids).logits, logits, rtol=0, atol=0)


def test_an_exception_in_the_context_restores_the_attention() -> None:
    adapter = load("gemma3_text-eager-float64")
    within: list[str] = []

    def fail() -> None:
        within.extend(attention_names(adapter))
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), packed_attention(adapter):
        fail()
    assert set(within) == {"lit_edit_packed"}
    assert set(attention_names(adapter)) == {"eager"}


# ---- masks -----------------------------------------------------------------------------------------------------------


def test_masks_of_other_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="of 2 dimensions are not supported: load the model"):
        allowed_positions(torch.ones(2, 5), torch.ones(2, 5))


def test_no_mask_means_causal() -> None:
    allowed = allowed_positions(None, torch.tensor([[1, 1, 1], [1, 1, 0]]))
    assert allowed.tolist() == [
        [[True, False, False], [True, True, False], [True, True, True]],
        [[True, False, False], [True, True, False], [True, True, False]],
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_additive_masks_say_the_same_as_boolean_ones(dtype: torch.dtype) -> None:
    seen = torch.ones(2, 1, 4, 4, dtype=torch.bool).tril()
    additive = torch.zeros(2, 1, 4, 4, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    padding = torch.ones(2, 4)
    assert torch.equal(allowed_positions(additive, padding), allowed_positions(seen, padding))
    assert torch.equal(allowed_positions(seen[:1], padding), seen[:, 0])


@pytest.mark.parametrize("name", ["gpt2-sdpa-float64", "llama-sdpa-float64", "gemma3-windows-of-both-kinds"])
@torch.no_grad()
def test_rows_of_one_length(name: str) -> None:
    """Without padding some models pass no mask."""
    adapter, same = load(name), (A[:5], A[:2] + B[:3], B[:5])
    rows = TokenRows(adapter, same, 0)
    if name != "gemma3-windows-of-both-kinds":
        assert rows.calls[0].get("attention_mask") is None
    line = rows.line()
    states = line.run(line.hidden, 0, LAYERS)
    for row, ids in enumerate(same):
        torch.testing.assert_close(of_row(line, states, row, 0, 5), alone(name, ids)[0][LAYERS], **tolerance(name))


# ---- any rows --------------------------------------------------------------------------------------------------------

few = settings(max_examples=15, deadline=None, database=None)
token_rows = st.lists(st.lists(st.integers(3, 5), min_size=1, max_size=8).map(tuple), min_size=1, max_size=7)


@pytest.mark.parametrize("name", ["gpt2-sdpa-float64", "mistral-window", "gemma2-window", "gptj-eager-float64"])
@few
@given(rows=token_rows, data=st.data(), overhead=st.sampled_from([0, 5, 10**6]), layer=st.integers(0, LAYERS))
@torch.no_grad()
def test_any_rows_from_any_starts(
    name: str, rows: list[tuple[int, ...]], data: st.DataObject, overhead: int, layer: int
) -> None:
    adapter = load(name)
    starts = [data.draw(st.integers(0, len(row) - 1)) for row in rows]
    chosen = data.draw(st.lists(st.sampled_from(range(len(rows))), min_size=1, unique=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_module, "_BLOCK_OVERHEAD", overhead)
        source = TokenRows(adapter, rows, 0)
        line = source.line()
        assert len(line) == (len(prefixes(rows)) if packs(name) else sum(map(len, rows)))
        result = line.run(line.hidden, 0, layer)
        for number, row in enumerate(rows):
            found = of_row(line, result, number, 0, len(row))
            torch.testing.assert_close(found, alone(name, row)[0][layer], **tolerance(name))

        source = TokenRows(adapter, rows, 0, share=starts)
        whole = source.line()
        states = whole.run(whole.hidden, 0, layer)
        before, kept = None, {}
        if any(starts):
            before = source.line(stops=starts)
            before.run(whole.carry(states, before), layer, LAYERS, keep=kept)
        after = source.line(chosen, [starts[row] for row in chosen], behind=before)
        result = after.run(whole.carry(states, after), layer, LAYERS, kept)
        for number in chosen:
            found = of_row(after, result, number, starts[number], len(rows[number]))
            expected = alone(name, rows[number])[0][LAYERS, starts[number] :]
            torch.testing.assert_close(found, expected, **tolerance(name))


@few
@given(rows=token_rows)
@torch.no_grad()
def test_nodes_are_the_distinct_beginnings_of_any_rows(rows: list[tuple[int, ...]]) -> None:
    source = TokenRows(load("gpt2-sdpa-float64"), rows, 0)
    beginnings = sorted(
        (row[: i + 1], node) for row, path in zip(rows, source.paths, strict=True) for i, node in enumerate(path)
    )
    for (first, one), (second, other) in pairwise(beginnings):
        assert (first == second) == (one == other)
    assert sorted(source.line().nodes.tolist()) == list(range(len(prefixes(rows))))


@pytest.mark.parametrize("family", sorted(TINY_CONFIGS))
def test_known_families_pass_the_check_of_described_ones(family: str) -> None:
    check_passes(ModelAdapter(tiny_model(family)))


def test_a_description_that_leaves_something_out_is_refused() -> None:
    model = tiny_model("llama")
    spec = find_spec(model)
    with pytest.raises(UnknownArchitectureError, match="says something else than on its own"):
        check_passes(ModelAdapter(model, replace(spec, norm=None)))
