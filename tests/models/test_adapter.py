"""The adapter against the models themselves: every family, both paddings, both attention implementations."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from functools import cache, partial, wraps

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lit_edit.errors import ArgumentError
from lit_edit.models import ArchSpec, ModelAdapter, UnknownArchitectureError, find_spec
from lit_edit.testing import TINY_CONFIGS, tiny_model
from tests.models.every_type import tiny

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
    first, calls = adapter.record_calls(ids, mask)
    for layer in (0, 2, adapter.n_layers):
        entering = adapter.run_layers(first, calls, 0, layer)
        hidden = adapter.run_layers(entering, calls, layer, adapter.n_layers)
        logits = adapter.logits(adapter.finish(hidden))
        torch.testing.assert_close(logits[mask.bool()], truth, **tolerance(family, attention))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_last_hidden_is_what_the_head_reads(family: str) -> None:
    adapter = ModelAdapter(load(family))
    ids, mask = padded("left")
    logits = adapter.logits(adapter.last_hidden(ids, mask)[mask.bool()])
    torch.testing.assert_close(logits, row_logits(adapter.model), **tolerance(family))


@torch.no_grad()
def test_no_hook_stays_behind() -> None:
    adapter = ModelAdapter(load("llama"))
    ids, mask = padded("right")
    adapter.record_calls(ids, mask)
    adapter.read_keys(ids, mask, [1])
    with pytest.raises(RuntimeError, match="inside"), adapter.record_keys([0, 3]):
        raise RuntimeError("inside")
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in adapter.model.modules())


# ---- calls without layers --------------------------------------------------------------------------------------------


def heard(adapter: ModelAdapter, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, dict[int, dict]]:
    """What the first layer takes in, and all arguments of all layers, in a real forward pass."""
    calls: dict[int, dict] = {}

    def listen(index: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        signature = inspect.signature(type(module).forward)
        calls[index] = dict(signature.bind(module, *args, **kwargs).arguments)
        del calls[index][next(iter(signature.parameters))]
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                calls[index] |= calls[index].pop(name, {})

    handles = [
        layer.register_forward_pre_hook(partial(listen, index), with_kwargs=True)
        for index, layer in enumerate(adapter.layers)
    ]
    adapter.last_hidden(ids, mask)
    for handle in handles:
        handle.remove()
    hidden = [call.pop("hidden_states") for call in calls.values()]
    return hidden[0], calls


def same(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, (tuple, list)) and isinstance(second, (tuple, list)):
        return len(first) == len(second) and all(map(same, first, second))
    return type(first) is type(second) and first == second


@pytest.mark.parametrize("side", ["right", "left", "none"])
@pytest.mark.parametrize(("family", "attention"), BOTH)
@torch.no_grad()
def test_recorded_calls_are_those_of_a_real_pass(family: str, attention: str, side: str) -> None:
    adapter = ModelAdapter(load(family, attention))
    ids, mask = padded("right" if side == "none" else side)
    mask = torch.ones_like(mask) if side == "none" else mask
    expected_hidden, expected = heard(adapter, ids, mask)
    hidden, calls = adapter.record_calls(ids, mask)
    assert torch.equal(hidden, expected_hidden)
    assert list(calls) == list(expected) == list(range(adapter.n_layers))
    for layer, call in calls.items():
        assert call.keys() == expected[layer].keys()
        assert [name for name, value in call.items() if not same(value, expected[layer][name])] == []


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_recording_runs_no_layer_and_leaves_the_layers_as_they_were(family: str) -> None:
    adapter = ModelAdapter(load(family))
    ids, mask = padded("right")
    before = adapter.last_hidden(ids, mask)
    with adapter.record_keys(range(adapter.n_layers)) as keys:
        adapter.record_calls(ids, mask)
    assert not keys
    assert not any("forward" in vars(layer) for layer in adapter.layers)
    assert torch.equal(adapter.last_hidden(ids, mask), before)


@pytest.mark.parametrize("layer", [None, 0, 2, 3], ids=["embedding", "first", "middle", "last"])
@torch.no_grad()
def test_an_exception_while_recording_leaves_the_layers_as_they_were(layer: int | None) -> None:
    adapter = ModelAdapter(load("llama"))
    ids, mask = padded("right")

    def fail(*_: object) -> None:
        raise RuntimeError("inside")

    module = adapter.model.get_input_embeddings() if layer is None else adapter.layers[layer]
    handle = module.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="inside"):
        adapter.record_calls(ids, mask)
    handle.remove()
    assert not any("forward" in vars(layer) for layer in adapter.layers)
    torch.testing.assert_close(adapter.model(input_ids=ids[:1]).logits[0], row_logits(adapter.model)[: LENGTHS[0]])


@torch.no_grad()
def test_recording_keeps_forward_methods_that_others_put_in_place() -> None:
    """accelerate replaces ``layer.forward`` of models that are spread over devices."""
    adapter = ModelAdapter(load.__wrapped__("llama"))
    ids, mask = padded("right")
    layer = adapter.layers[1]
    layer.forward = put = wraps(layer.forward)(partial(layer.forward))
    adapter.record_calls(ids, mask)
    assert vars(layer).get("forward") is put


@torch.no_grad()
def test_recorded_input_is_that_of_the_view() -> None:
    adapter = ModelAdapter(load("llama"))
    name = "model.embed_tokens.weight"
    view = adapter.with_weights({name: 2 * adapter.model.get_parameter(name)})
    ids, mask = padded("right")
    assert torch.equal(view.record_calls(ids, mask)[0], 2 * adapter.record_calls(ids, mask)[0])


@pytest.mark.parametrize(("family", "attention"), BOTH)
@torch.no_grad()
def test_masks_are_of_the_models_kind(family: str, attention: str) -> None:
    adapter = ModelAdapter(load(family, attention))
    assert adapter.attention == attention
    made = adapter.mask_like(torch.tensor([[True, False], [True, True]]))
    assert made.dtype == (torch.bool if attention == "sdpa" else adapter.dtype)
    seen = made if attention == "sdpa" else made == 0
    assert seen.tolist() == [[True, False], [True, True]]
    assert attention == "sdpa" or made[0, 1] == torch.finfo(adapter.dtype).min


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_reached_where_it_can_be(family: str) -> None:
    assert ModelAdapter(load(family)).packs == (family != "gptj")
    if family == "gpt2":
        assert not ModelAdapter(load(family, reorder_and_upcast_attn=True)).packs


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
def test_keys_of_a_layer_run_alone_agree_with_read_keys(family: str) -> None:
    adapter = ModelAdapter(load(family))
    ids, mask = padded("right")
    first, calls = adapter.record_calls(ids, mask)
    entering = adapter.run_layer(0, first, calls[0])
    with adapter.record_keys([1]) as keys:
        output = adapter.run_layer(1, entering, calls[1])
    real, found = mask.bool(), keys[1].reshape(*ids.shape, -1)
    torch.testing.assert_close(found[real], adapter.read_keys(ids, mask, [1])[1][real], **tolerance(family))
    torch.testing.assert_close(output, adapter.run_layers(entering, calls, 1, 2), rtol=0, atol=0)


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
    continued = view.logits(view.finish(view.run_layers(*view.record_calls(ids, mask), 0, 4)))
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


def test_a_model_without_an_mlp_lists_modules_and_shows_the_yaml() -> None:
    with pytest.raises(UnknownArchitectureError) as caught:
        ModelAdapter(tiny("mamba"))
    message = str(caught.value)
    assert "'mamba'" in message
    assert "no layer has a linear map from an inner width to the residual stream of width 32" in message
    for line in ("  backbone.layers.{}.mixer.out_proj", "  backbone.norm_f", "  lm_head"):
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
    logits = adapter.logits(adapter.finish(adapter.run_layers(*adapter.record_calls(ids, mask), 0, 4)))
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
    logits = adapter.logits(adapter.finish(adapter.run_layers(*adapter.record_calls(ids, mask), 0, 4)))
    torch.testing.assert_close(logits[mask.bool()], row_logits(adapter.model), **tolerance("opt"))
