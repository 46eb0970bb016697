"""The adapter against the models themselves: every family, both paddings, both attention implementations."""

from __future__ import annotations

import re
from dataclasses import fields
from functools import cache

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lit_edit.errors import ArgumentError
from lit_edit.models import ArchSpec, ModelAdapter, UnknownArchitectureError, find_spec
from lit_edit.models.adapter import take_rows
from lit_edit.models.suffix import SuffixBatch
from lit_edit.testing import TINY_CONFIGS, tiny_model

FAMILIES = sorted(TINY_CONFIGS)
LENGTHS = (11, 8, 5)  # longer than the sliding windows (6) and shorter
SDPA = [family for family in FAMILIES if family not in ("gptj", "gemma2")]  # the others have eager attention only
BOTH = [(family, "eager") for family in FAMILIES] + [(family, "sdpa") for family in SDPA]
ROUND_OFF = {"rtol": 1e-10, "atol": 1e-10}  # float64, a few hundred operations


def tolerance(family: str, attention: str = "sdpa") -> dict[str, float]:
    """float64 all the way with LayerNorm and sdpa; RMSNorm and eager softmax round to float32 inside."""
    exact = family in ("gpt2", "gpt_neox", "opt") and attention == "sdpa"
    return ROUND_OFF if exact else {"rtol": 2e-5, "atol": 2e-5}


def rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 400, (length,), generator=generator).tolist() for length in LENGTHS]


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(LENGTHS)
    ids, mask = (
        torch.zeros(len(LENGTHS), longest, dtype=torch.long),
        torch.zeros(len(LENGTHS), longest, dtype=torch.long),
    )
    for index, row in enumerate(rows()):
        where = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[index, where], mask[index, where] = torch.tensor(row), 1
    return ids, mask


@torch.no_grad()
def row_logits(model: nn.Module) -> torch.Tensor:
    """The truth: each row alone, without padding, through the whole model; all real tokens in order."""
    return torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in rows()])


@cache
def load(family: str, attention: str = "sdpa", **settings: object) -> nn.Module:
    """float64 with sdpa, else float32: transformers' eager masks in float64 make NaN of fully masked (padding) rows."""
    if attention == "eager" or family not in SDPA:
        return tiny_model(family, torch.float32, attn_implementation="eager", **settings)
    return tiny_model(family, torch.float64, attn_implementation="sdpa", **settings)


# ---- partial forward passes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("family", "attention"), BOTH)
@torch.no_grad()
def test_continued_pass_equals_the_model(family: str, side: str, attention: str) -> None:
    adapter = ModelAdapter(load(family, attention))
    truth = row_logits(adapter.model)
    ids, mask = padded(side)
    for layer in (0, 2, adapter.n_layers):
        trace = adapter.trace(ids, mask, at=layer)
        hidden = adapter.run_layers(trace.hidden, trace.calls, layer, adapter.n_layers)
        logits = adapter.logits(adapter.finish(hidden))
        torch.testing.assert_close(logits[mask.bool()], truth, **tolerance(family, attention))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_trace_stopped_early_records_the_same(family: str) -> None:
    adapter = ModelAdapter(load(family))
    ids, mask = padded("right")
    whole, stopped = adapter.trace(ids, mask, at=1), adapter.trace(ids, mask, at=1, stop=3)
    assert sorted(stopped.calls) == [1, 2]
    assert sorted(whole.calls) == [1, 2, 3]
    results = [adapter.run_layers(t.hidden, t.calls, 1, 3) for t in (whole, stopped)]
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    expected = adapter.trace(ids, mask, at=3).hidden
    torch.testing.assert_close(results[0][mask.bool()], expected[mask.bool()], **tolerance(family))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_last_hidden_is_what_the_head_reads(family: str) -> None:
    adapter = ModelAdapter(load(family))
    ids, mask = padded("left")
    logits = adapter.logits(adapter.last_hidden(ids, mask)[mask.bool()])
    torch.testing.assert_close(logits, row_logits(adapter.model), **tolerance(family))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_of_a_trace_continue_alone(family: str) -> None:
    adapter = ModelAdapter(load(family))
    ids, mask = padded("right")
    trace = adapter.trace(ids, mask, at=1)
    whole = adapter.run_layers(trace.hidden, trace.calls, 1, 4)
    chosen = torch.tensor([2, 0])
    part = adapter.run_layers(trace.hidden[chosen], trace.calls_for(chosen), 1, 4)
    real = mask[chosen].bool()
    torch.testing.assert_close(part[real], whole[chosen][real], **tolerance(family))


def test_take_rows_keeps_shared_tensors_shared() -> None:
    shared, scalar = torch.arange(6.0).view(3, 2), torch.tensor(1.0)
    taken = take_rows({0: {"a": shared, "s": scalar}, 1: {"b": (shared, None)}}, torch.tensor([2]), 3)
    assert taken[0]["a"] is taken[1]["b"][0]
    assert taken[0]["s"] is scalar
    torch.testing.assert_close(taken[0]["a"], shared[[2]])


@torch.no_grad()
def test_no_hook_stays_behind() -> None:
    adapter = ModelAdapter(load("llama"))
    ids, mask = padded("right")
    adapter.trace(ids, mask, at=1, stop=2)
    adapter.read_keys(ids, mask, [1])
    with pytest.raises(RuntimeError, match="inside"), adapter.record_keys([0, 3]):
        raise RuntimeError("inside")
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in adapter.model.modules())


# ---- the suffix ------------------------------------------------------------------------------------------------------


def suffix_case(family: str, attention: str) -> tuple[ModelAdapter, torch.Tensor, torch.Tensor, list[int], int]:
    ids, mask = padded("right")
    return ModelAdapter(load(family, attention)), ids, mask, [4, 7, 0], 2  # in the middle, the last token, the first


@pytest.mark.parametrize(("family", "attention"), BOTH)
@torch.no_grad()
def test_suffix_equals_the_full_pass(family: str, attention: str) -> None:
    adapter, ids, mask, starts, layer = suffix_case(family, attention)
    trace = adapter.trace(ids, mask, at=layer, keep_cache=True)
    moved = 3.0 * torch.randn(3, trace.hidden.shape[2], generator=torch.Generator().manual_seed(1)).to(trace.hidden)
    full = trace.hidden.clone()
    for row, start in enumerate(starts):
        full[row, start] += moved[row]
    expected = adapter.run_layers(full, trace.calls, layer, adapter.n_layers)

    batch = SuffixBatch.from_trace(adapter, trace, starts, LENGTHS)
    for chosen in ([0, 1, 2], [2, 0], [1]):
        part = batch if chosen == [0, 1, 2] else batch.select(torch.tensor(chosen))
        hidden = part.hidden.clone()
        hidden[:, 0] += moved[chosen]
        result = part.run(adapter, hidden, layer, adapter.n_layers)
        for index, row in enumerate(chosen):
            size = LENGTHS[row] - starts[row]
            wanted = expected[row, starts[row] : LENGTHS[row]]
            torch.testing.assert_close(result[index, :size], wanted, **tolerance(family, attention))


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma3_text"])
@torch.no_grad()
def test_suffix_of_rows_without_padding(family: str) -> None:
    """Without padding sdpa models pass no mask at all; the suffix must make one."""
    adapter = ModelAdapter(load(family))
    ids = torch.tensor([row[:5] for row in rows()])
    trace = adapter.trace(ids, torch.ones_like(ids), at=1, keep_cache=True)
    if family != "gemma3_text":
        assert trace.calls[1].get("attention_mask") is None
    expected = adapter.run_layers(trace.hidden, trace.calls, 1, 4)
    batch = SuffixBatch.from_trace(adapter, trace, [2, 4, 1], [5, 5, 5])
    result = batch.run(adapter, batch.hidden, 1, 4)
    for row, start in enumerate([2, 4, 1]):
        torch.testing.assert_close(result[row, : 5 - start], expected[row, start:], **tolerance(family))


@torch.no_grad()
def test_suffix_is_differentiable_in_the_lookup_state_only_through_the_suffix() -> None:
    adapter, ids, mask, starts, layer = suffix_case("gpt2", "sdpa")
    trace = adapter.trace(ids, mask, at=layer, keep_cache=True)
    with torch.enable_grad():
        full = trace.hidden.clone().requires_grad_()
        adapter.run_layers(full, trace.calls, layer, 4)[0, LENGTHS[0] - 1].square().sum().backward()
        batch = SuffixBatch.from_trace(adapter, trace, starts, LENGTHS)
        part = batch.hidden.clone().requires_grad_()
        batch.run(adapter, part, layer, 4)[0, LENGTHS[0] - 1 - starts[0]].square().sum().backward()
    torch.testing.assert_close(part.grad[0, 0], full.grad[0, starts[0]], **ROUND_OFF)
    assert full.grad[0, starts[0]].norm() > 1e-3


def test_suffix_needs_a_cache() -> None:
    adapter, ids, mask, starts, layer = suffix_case("gpt2", "sdpa")
    with torch.no_grad(), pytest.raises(ValueError, match="keep_cache=True"):
        SuffixBatch.from_trace(adapter, adapter.trace(ids, mask, at=layer), starts, LENGTHS)


# ---- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_read_keys_equals_a_plain_hook(family: str) -> None:
    adapter = ModelAdapter(load(family))
    ids, mask = padded("right")
    found: dict[int, torch.Tensor] = {}
    handles = [
        adapter.down_proj(layer).register_forward_pre_hook(lambda m, a, layer=layer: found.__setitem__(layer, a[0]))
        for layer in (1, 3)
    ]
    adapter.model(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    keys = adapter.read_keys(ids, mask, [1, 3])
    assert sorted(keys) == [1, 3]
    for layer, key in keys.items():
        assert key.shape == (*ids.shape, adapter.shape(layer)[1])
        plain = found[layer].reshape(*ids.shape, -1)
        torch.testing.assert_close(key[mask.bool()], plain[mask.bool()], **tolerance(family))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_run_layer_with_keys_agrees_with_read_keys(family: str) -> None:
    adapter = ModelAdapter(load(family))
    ids, mask = padded("right")
    trace = adapter.trace(ids, mask, at=1)
    output, keys = adapter.run_layer_with_keys(1, trace.hidden, trace.calls[1])
    real = mask.bool()
    torch.testing.assert_close(keys[real], adapter.read_keys(ids, mask, [1])[1][real], **tolerance(family))
    torch.testing.assert_close(output, adapter.run_layers(trace.hidden, trace.calls, 1, 2), rtol=0, atol=0)


# ---- weights ---------------------------------------------------------------------------------------------------------

SQUARE = [("gpt2", {"n_inner": 32}, Conv1D), ("llama", {"intermediate_size": 32}, nn.Linear)]
OBLONG = [("gpt2", {}, Conv1D), ("llama", {}, nn.Linear), ("opt", {}, nn.Linear)]


@pytest.mark.parametrize(("family", "settings", "kind"), SQUARE + OBLONG)
@torch.no_grad()
def test_layout_follows_the_module_type(family: str, settings: dict[str, int], kind: type[nn.Module]) -> None:
    adapter = ModelAdapter(load(family, **settings))
    module = adapter.down_proj(1)
    assert isinstance(module, kind)
    d_out, d_in = adapter.shape(1)
    assert (d_out == d_in) == bool(settings)
    generator = torch.Generator().manual_seed(2)
    key = torch.randn(d_in, generator=generator).to(module.weight)
    delta = torch.randn(d_out, d_in, generator=generator).to(module.weight)
    before = module(key[None])[0]
    moved = torch.func.functional_call(module, {"weight": module.weight + adapter.to_layout(1, delta)}, (key[None],))[0]
    torch.testing.assert_close(moved - before, delta @ key, **ROUND_OFF)
    assert not torch.allclose(delta @ key, delta.T[:d_out, :d_out] @ key[:d_out], atol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_view_computes_with_other_weights_and_leaves_the_model_alone(family: str) -> None:
    adapter = ModelAdapter(load(family))
    before = {name: value.clone() for name, value in adapter.model.state_dict().items()}
    ids, mask = padded("right")
    other = load.__wrapped__(family)  # one of its own, to be changed
    weights = {}
    for layer in (1, 2):
        name = adapter.weight_name(layer)
        module = other.get_submodule(name.removesuffix(".weight"))
        module.weight.add_(0.3 * torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(layer)))
        weights[name] = module.weight.clone()
    view = adapter.with_weights({adapter.weight_name(1): weights[adapter.weight_name(1)]}).with_weights(weights)
    truth, real = row_logits(other), mask.bool()
    trace = view.trace(ids, mask, at=1)
    continued = view.logits(view.finish(view.run_layers(trace.hidden, trace.calls, 1, 4)))
    for logits in (continued, view.logits(view.last_hidden(ids, mask))):
        torch.testing.assert_close(logits[real], truth, **tolerance(family))
    expected = ModelAdapter(other).read_keys(ids, mask, [3])[3]
    torch.testing.assert_close(view.read_keys(ids, mask, [3])[3][real], expected[real], **tolerance(family))
    torch.testing.assert_close(view.weight(2), weights[adapter.weight_name(2)], rtol=0, atol=0)
    after = adapter.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert (truth - row_logits(adapter.model)).abs().max() > 1e-2  # the other weights do matter


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_name_is_the_parameters_name(family: str) -> None:
    adapter = ModelAdapter(load(family))
    parameters = dict(adapter.model.named_parameters())
    for layer in range(adapter.n_layers):
        assert parameters[adapter.weight_name(layer)] is adapter.down_proj(layer).weight
        assert adapter.weight(layer) is adapter.down_proj(layer).weight


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
@torch.no_grad()
def test_logits_are_never_half_precision(dtype: torch.dtype, expected: torch.dtype) -> None:
    adapter = ModelAdapter(tiny_model("llama", dtype))
    ids, mask = padded("right")
    assert adapter.logits(adapter.last_hidden(ids, mask)).dtype == expected


# ---- descriptions and errors -----------------------------------------------------------------------------------------


def unknown_model() -> nn.Module:
    config = AutoConfig.for_model("olmo2", **{k: v for k, v in TINY_CONFIGS["llama"].items() if k != "head_dim"})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).double().eval().requires_grad_(False)


def test_unknown_architecture_lists_modules_and_shows_the_yaml() -> None:
    with pytest.raises(UnknownArchitectureError) as caught:
        ModelAdapter(unknown_model())
    message = str(caught.value)
    assert "'olmo2'" in message
    for line in ("  model.layers.{}.mlp.down_proj", "  model.norm", "  lm_head"):
        assert line in message.splitlines()
    assert not re.search(r"layers\.\d", message)  # one line per kind of module, not per layer
    shown = yaml.safe_load(message[message.index("  model:\n") :])
    arch = shown["model"]["language_model"]["arch"]
    required = {f.name for f in fields(ArchSpec)} & {"family", "layers", "down_proj", "norm"}
    assert set(arch) == required


@torch.no_grad()
def test_described_architecture_works() -> None:
    """What the error message asks for is enough."""
    spec = ArchSpec(family="olmo2", layers="model.layers", down_proj="mlp.down_proj", norm="model.norm")
    adapter = ModelAdapter(unknown_model(), spec)
    ids, mask = padded("left")
    trace = adapter.trace(ids, mask, at=2)
    logits = adapter.logits(adapter.finish(adapter.run_layers(trace.hidden, trace.calls, 2, 4)))
    torch.testing.assert_close(logits[mask.bool()], row_logits(adapter.model), **tolerance("olmo2"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layers": "model.blocks"}, "'model.blocks'"),
        ({"norm": "model.final_norm.x"}, "'model.final_norm'"),
        ({"head": "output"}, "'output'"),
        ({"down_proj": "mlp.fc2"}, "'mlp.fc2'"),
        ({"down_proj": "mlp.act_fn"}, "'mlp.act_fn'"),
    ],
)
def test_description_that_does_not_fit_names_the_module(changes: dict[str, str], named: str) -> None:
    settings = {"family": "mine", "layers": "model.layers", "down_proj": "mlp.down_proj", "norm": "model.norm"}
    with pytest.raises(UnknownArchitectureError, match=re.escape(named)):
        ModelAdapter(load("llama"), ArchSpec(**{**settings, **changes}))


@pytest.mark.parametrize("layer", [-1, 4, 99])
def test_layer_out_of_range_names_the_range(layer: int) -> None:
    adapter = ModelAdapter(load("gpt2"))
    for call in (adapter.down_proj, adapter.shape, adapter.check_layer, adapter.weight):
        with pytest.raises(ArgumentError, match=rf"layer {layer} does not exist.* 0 to 3"):
            call(layer)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_described_once(family: str) -> None:
    spec = find_spec(load(family))
    assert family in spec.model_types
    adapter = ModelAdapter(load(family))
    assert adapter.norm is not None
    assert adapter.n_layers == 4


@torch.no_grad()
def test_opt_with_projected_embeddings() -> None:
    """OPT-350m: states are projected out between last layer and head, and there is no final norm."""
    adapter = ModelAdapter(load("opt", word_embed_proj_dim=16, do_layer_norm_before=False))
    assert adapter.norm is None
    assert isinstance(adapter.post_norm, nn.Linear)
    ids, mask = padded("left")
    trace = adapter.trace(ids, mask, at=1)
    logits = adapter.logits(adapter.finish(adapter.run_layers(trace.hidden, trace.calls, 1, 4)))
    torch.testing.assert_close(logits[mask.bool()], row_logits(adapter.model), **tolerance("opt"))
