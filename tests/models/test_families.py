"""One edit that takes, in a tiny model of every family."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_edit.data.request import EditRequest
from lit_edit.editors import D4S, TargetSettings
from lit_edit.models import ModelAdapter
from lit_edit.models.spec import ArchSpec
from lit_edit.models.structure import UnknownArchitectureError
from lit_edit.targets.problem import build_problem
from lit_edit.testing import TINY_CONFIGS, tiny_tokenizer
from tests.parity.test_d4s_acceptance import Run, read_moments, tiny

VISIT = EditRequest("visit", "So did {}", "Serena Williams", "chess")


POST_NORM = ("gemma2", "gemma3_text")
"""Families that normalise the MLP's output before it is added to the state: only its direction passes."""


@torch.no_grad()
def next_token(model: PreTrainedModel, text: str) -> int:
    return int(model(input_ids=torch.tensor([tiny_tokenizer()(text)["input_ids"]])).logits[0, -1].argmax())


def one_edit(model: PreTrainedModel, layers: tuple[int, ...]) -> tuple[Run, Tensor]:
    """Write ``VISIT`` with a weak prior; return the run and the target state."""
    moments = read_moments(ModelAdapter(model), layers)
    settings = {"contexts": "plain", "covariance_weight": 1e-3, "target": TargetSettings(steps=40, clamp=10.0)}
    run = Run(D4S(layers=layers, **settings), model, moments)
    run.editor.propose([VISIT])
    value = run.editor.targets[VISIT.id][1].value
    run.edit(VISIT)
    return run, value


def edit_takes(model: PreTrainedModel, layers: tuple[int, ...]) -> None:
    """The target becomes the model's own next word."""
    [wanted] = tiny_tokenizer()(" chess")["input_ids"]
    assert next_token(model, VISIT.text) != wanted
    one_edit(model, layers)
    assert next_token(model, VISIT.text) == wanted


@pytest.mark.parametrize("family", sorted(TINY_CONFIGS))
def test_edit_takes(family: str) -> None:
    # Through a norm one layer can add a vector of fixed length only; three reach the target, two fall short.
    edit_takes(tiny(family), (1, 2, 3) if family in POST_NORM else (1, 2))


@pytest.mark.parametrize("family", sorted(set(TINY_CONFIGS) - set(POST_NORM)))
@torch.no_grad()
def test_state_reaches_its_target(family: str) -> None:
    run, value = one_edit(tiny(family), (1, 2))
    prompt = build_problem(tiny_tokenizer(), VISIT, (("{}",),)).prompts[0]
    ids = torch.tensor([prompt.ids])
    first, calls = run.ledger.adapter.record_calls(ids, torch.ones_like(ids))
    state = run.ledger.adapter.run_layers(first, calls, 0, 3)[0, prompt.lookup]
    assert (state - value).norm() < 1e-2 * value.norm()  # lambda is 1e-3, not 0


@pytest.mark.parametrize("family", POST_NORM)
@torch.no_grad()
def test_residuals_are_aimed_through_the_norm(family: str) -> None:
    adapter = ModelAdapter(tiny(family))
    d_out, d_in = adapter.shape(1)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(3, d_in, generator=generator, dtype=adapter.dtype)
    wanted = torch.randn(d_out, 3, generator=generator, dtype=torch.float64)
    output = adapter.down_proj(1)(keys)
    norm = adapter.layers[1].post_feedforward_layernorm
    lacking = adapter.to_weight_residual(1, keys, wanted)
    reached = norm(output + lacking.T.to(output))
    scale = norm(torch.ones(d_out, dtype=adapter.dtype))
    aimed = (norm(output) + wanted.T.to(output)) / scale  # the whole direction can be had, its length can not
    divided = norm(aimed)
    missed = [(found - norm(output) - wanted.T.to(output)).norm(dim=1) for found in (reached, divided)]
    assert (missed[0] < missed[1]).all()
    assert (torch.cosine_similarity(reached / scale, aimed) > 0.97).all()
    same_length = (output + lacking.T.to(output)).norm(dim=1)
    torch.testing.assert_close(same_length, output.norm(dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "settings"), [("gpt2", {"n_inner": 32}), ("llama", {"intermediate_size": 32})])
def test_edit_takes_in_square_matrices(family: str, settings: dict[str, int]) -> None:
    """A transposed update has the right shape here, and the edit would not take."""
    model = tiny(family, **settings)
    assert len(set(ModelAdapter(model).down_proj(1).weight.shape)) == 1
    edit_takes(model, (1, 2))


@pytest.mark.parametrize(
    ("part", "path", "meant"),
    [
        ("layers", "model.layer", "model.layers"),
        ("norm", "model.nrom", "model.norm"),
        ("down_proj", "mlp.down_prj", "mlp.down_proj"),
        ("down_proj", "mpl.down_proj", "mlp.down_proj"),
    ],
)
def test_a_misspelt_path_names_the_nearest(part: str, path: str, meant: str) -> None:
    names = {"family": "mine", "layers": "model.layers", "down_proj": "mlp.down_proj", "norm": "model.norm"}
    spec = ArchSpec(**{**names, part: path})
    with pytest.raises(UnknownArchitectureError, match=rf"{re.escape(path)}'.*; did you mean {re.escape(meant)}\?\."):
        ModelAdapter(tiny("llama"), spec)
