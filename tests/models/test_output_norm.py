"""Models that normalise or scale what an MLP says before it is added: edits aim through that."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from lit_edit import D4S, EditRequest, TargetSettings
from lit_edit.editors import MEMIT, ROME
from lit_edit.editors.base import commit_proposal
from lit_edit.editors.closed_form.engine import ClosedFormEditor
from lit_edit.ledger.edit_ledger import EditLedger
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.described import check_if_new
from lit_edit.models.weights import nearest_direction
from lit_edit.testing import tiny_model, tiny_tokenizer

from .every_type import tiny

REQUEST = EditRequest(id="a", prompt="So did {}", subject="Serena Williams", target_new="chess")
DOUBLE = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def real_scales(size: int = 640) -> Tensor:
    """Scales as those of Gemma 3 270M at layer 5: a median of 8, one of 741, some of 0.03, a length of 860."""
    scales = 8.3 * torch.exp(0.6 * draw(size))
    scales[:5] = torch.tensor([0.03, 0.3, -1.0, 400.0, 741.0], dtype=DOUBLE)
    return scales


# ---- the nearest that can be said ------------------------------------------------------------------------------------


def test_what_can_be_said_is_said() -> None:
    scales, wanted = real_scales(), draw(3, 640)
    unit = wanted / wanted.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(nearest_direction(scales, scales * unit), unit, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("length", [50.0, 426.0, 4000.0, 40_000.0])
def test_it_is_the_nearest(length: float) -> None:
    """The conditions of Karush, Kuhn and Tucker, and what is tried beside it."""
    scales = real_scales()
    wanted = draw(4, 640, seed=1)
    wanted *= length / wanted.norm(dim=1, keepdim=True)
    found = nearest_direction(scales, wanted)
    torch.testing.assert_close(found.square().mean(1), torch.ones(4, dtype=DOUBLE), rtol=1e-9, atol=0)
    slope = scales * (wanted - scales * found)  # half of the descent: mu u, with one mu for all coordinates
    mu = (slope * found).sum(1, keepdim=True) / found.square().sum(1, keepdim=True)
    assert (slope - mu * found).norm() < 1e-6 * (scales * wanted).norm()
    assert (mu > -scales.square().min()).all()

    def missed(unit: Tensor) -> Tensor:
        unit = unit / unit.square().mean(1, keepdim=True).sqrt()
        return (scales * unit - wanted).norm(dim=1)

    best = missed(found)
    for step in (1e-3, 1e-1, 1.0):
        assert (best <= missed(found + step * draw(4, 640, seed=2)) + 1e-9).all()
    assert (best < missed(wanted / scales)).all()  # which the small scales take for themselves


def test_a_scale_of_zero_takes_nothing() -> None:
    scales = real_scales()
    scales[7] = 0.0
    found = nearest_direction(scales, 100 * draw(2, 640))
    assert torch.isfinite(found).all()
    assert found[:, 7].abs().max() == 0.0


# ---- edits -----------------------------------------------------------------------------------------------------------


def with_real_scales(model_type: str) -> torch.nn.Module:
    """A tiny model whose norms behind the MLP scale as a real one's do, before states that are five times as long."""
    model = tiny_model(model_type)
    own = real_scales(32).float()
    own *= 800 / own.norm()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(4000 / 5.7 / model.model.embed_tokens.weight.std() / 32**0.5)
        for layer in model.model.layers:
            layer.post_feedforward_layernorm.weight.copy_(own - 1)  # Gemma adds one
            layer.post_attention_layernorm.weight.copy_(own - 1)
    return model


def edit(adapter: ModelAdapter, editor: ClosedFormEditor, layers: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Make one edit; return the state behind the last edited layer, the wanted one, and the one before."""
    tokenizer = tiny_tokenizer()
    ledger = EditLedger(adapter, layers)
    moments = {layer: torch.eye(adapter.shape(layer)[1], dtype=DOUBLE) for layer in layers}
    editor.prepare(ledger, tokenizer, moments)
    ids = torch.tensor([tokenizer(REQUEST.text)["input_ids"]])
    place = ids.shape[1] - 1

    def state() -> Tensor:
        found: list[Tensor] = []
        hook = adapter.layers[layers[-1]].register_forward_hook(
            lambda module, args, out: found.append((out if isinstance(out, Tensor) else out[0])[0, place].clone())
        )
        adapter.last_hidden(ids, torch.ones_like(ids))
        hook.remove()
        return found[0].double()

    before = state()
    proposal = editor.propose([REQUEST], [REQUEST])
    commit_proposal(ledger, editor, proposal)
    [record] = ledger.facts_of([1])
    return state(), record.tensors["targets"][:, 0].double(), before


FIT = TargetSettings(steps=60, lr=0.5, kl_factor=0.0, weight_decay=0.0, clamp=4.0)
EDITORS = {
    "d4s": lambda: D4S(layers=[1, 2], covariance_weight=1e-6, contexts="plain", target=FIT),
    "memit": lambda: MEMIT(layers=[1, 2], covariance_weight=1e-6, contexts="plain", target=FIT),
    "rome": lambda: ROME(layers=[2], contexts="plain", target=FIT),
}


@pytest.mark.parametrize("name", EDITORS)
@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_targets_are_reached_with_the_scales_of_a_real_model(model_type: str, name: str) -> None:
    adapter = ModelAdapter(with_real_scales(model_type))
    editor = EDITORS[name]()
    reached, wanted, before = edit(adapter, editor, list(editor.layers))
    # Divided by the scales instead, it lands seven times as far from the target as it was before the edit.
    assert (reached - wanted).norm() < 0.8 * (wanted - before).norm()


@pytest.mark.parametrize("model_type", ["olmo2", "olmo3", "glm4", "exaone4", "granite"])
def test_norms_and_scales_behind_are_found(model_type: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        adapter = ModelAdapter(tiny(model_type))
        check_if_new(adapter)
    assert not caplog.records
    assert (adapter.spec.output_norm is None) == (model_type == "granite")
    assert adapter.output_scale == (0.22 if model_type == "granite" else 1.0)
    keys = draw(3, adapter.shape(1)[1]).float()
    residual = 0.1 * draw(adapter.shape(1)[0], 3, seed=1)
    missing = adapter.to_weight_residual(1, keys, residual)
    said = adapter.added(1, adapter.project(1, keys) + missing.T.float()) - adapter.mlp_output(1, keys)
    assert (said.T - residual).norm() < (1e-5 if model_type == "granite" else 0.5) * residual.norm()
