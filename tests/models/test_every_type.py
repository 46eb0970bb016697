"""Any decoder of transformers, found by its structure: its own logits layer by layer, an edit that takes, its undo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from lit_edit import D4S, EditRequest, TargetSettings
from lit_edit.editors.base import commit_proposal
from lit_edit.ledger.edit_ledger import EditLedger
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.described import check_if_new, check_passes
from lit_edit.models.discovery import NothingFoundError, discover
from lit_edit.models.families import SPECS
from lit_edit.models.generation import continue_greedily
from lit_edit.models.packed import TokenRows
from lit_edit.models.structure import UnknownArchitectureError
from lit_edit.testing import tiny_tokenizer

from .every_type import LEFT_OUT, TYPES, tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

SAMPLE = (
    # dense: parallel blocks, norms behind blocks, scaled logits, learned positions, slopes in place of positions
    *(
        "olmo2",
        "glm4",
        "granite",
        "cohere2",
        "falcon",
        "bloom",
        "mpt",
        "phi",
        "starcoder2",
        "gemma",
        "nemotron",
        "smollm3",
        "seed_oss",
    ),
    # hybrid: convolutions, linear attention, Mamba and attention in turn
    *("lfm2", "qwen3_next", "qwen3_5_text", "olmo_hybrid", "nemotron_h", "recurrent_gemma"),
    # experts, of which one is passed by every token, or some layers without
    *("deepseek_v3", "qwen2_moe", "glm4_moe", "ernie4_5_moe", "llama4_text"),
)
OTHERS = (
    *(
        "afmoe",
        "apertus",
        "arcee",
        "axk1",
        "axk2",
        "biogpt",
        "bitnet",
        "codegen",
        "cohere",
        "ctrl",
        "cwm",
        "deepseek_v32",
    ),
    *(
        "diffllama",
        "doge",
        "ernie4_5",
        "exaone4",
        "exaone_moe",
        "flint",
        "glm",
        "glm4_moe_lite",
        "glm_moe_dsa",
        "gpt-sw3",
    ),
    *(
        "gpt_bigcode",
        "gpt_neo",
        "gpt_neox_japanese",
        "granite_swa",
        "helium",
        "hunyuan_v1_dense",
        "hy_v3",
        "hyperclovax",
    ),
    *(
        "internlm3",
        "iquestcoder",
        "jais2",
        "kimi_linear",
        "kolibri1",
        "laguna",
        "lfm3",
        "minicpm3",
        "minimax_m3_vl_text",
    ),
    *("ministral", "ministral3", "modernbert-decoder", "moshi", "nanochat", "olmo", "olmo3", "openai-gpt", "persimmon"),
    *("qwen3_5_moe_text", "solar_open", "stablelm", "vaultgemma", "xglm", "youtu"),
    *("aria_text", "bailing_hybrid", "cohere2_moe", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "jamba"),
    *("lfm2_moe", "mimo_v2_flash"),
)
REQUEST = EditRequest(id="a", prompt="So did {}", subject="Serena Williams", target_new="chess")
FIT = TargetSettings(steps=40, lr=0.5, kl_factor=0.0, weight_decay=0.0, clamp=1e3)


@pytest.mark.parametrize("model_type", [*SAMPLE, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_an_edit_takes_and_its_undo_is_exact(model_type: str) -> None:
    model, tokenizer = tiny(model_type), tiny_tokenizer()
    adapter = ModelAdapter(model)
    check_passes(adapter)  # the model's own logits, layer by layer
    if adapter.spec.output_norm is not None:  # a layer then adds a vector of one length, here too short to get anywhere
        for layer in adapter.editable:
            adapter.output_norm(layer).weight.mul_(4.0)  # type: ignore[union-attr,operator]
    layers = [layer for layer in adapter.editable if layer >= 1] or list(adapter.editable)
    editor = D4S(layers=layers, covariance_weight=1e-9, contexts="plain", target=FIT)
    ledger = EditLedger(adapter, layers)
    ids = torch.tensor([tokenizer(REQUEST.text)["input_ids"]])
    before = model(input_ids=ids).logits
    moments = {layer: torch.eye(adapter.shape(layer)[1], dtype=torch.float64) for layer in layers}
    editor.prepare(ledger, tokenizer, moments)
    commit_proposal(ledger, editor, editor.propose([REQUEST], [REQUEST]))
    wanted = tokenizer(" chess")["input_ids"][0]
    said = continue_greedily(adapter, tokenizer, REQUEST.text, 1)
    assert int(model(input_ids=ids).logits[0, -1].argmax()) == wanted
    assert tokenizer.decode(wanted).strip() == said  # lit-edit's own passes agree
    ledger.restore_base()
    assert torch.equal(model(input_ids=ids).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["bloom", "falcon", "qwen3_next", "olmo2"])
def test_some_rows_of_several_are_run_as_they_are_alone(model_type: str) -> None:
    """What a layer is told may be by row, by row and head (slopes), or the same for all."""
    adapter = ModelAdapter(tiny(model_type))
    rows = [[5, 6, 7, 8, 9], [5, 6, 7], [11, 12, 13, 14, 15], [3, 4]]
    source = TokenRows(adapter, rows, pad=0)
    for chosen in ([0, 1, 2, 3], [2], [3, 1]):
        line = source.line(chosen, starts=[len(rows[row]) - 1 for row in chosen])
        states = line.run(line.hidden, 0, adapter.n_layers)
        ours = adapter.logits(adapter.finish(states[[line.index(row, len(rows[row]) - 1) for row in chosen]]))
        own = torch.stack([adapter.model(input_ids=torch.tensor([rows[row]])).logits[0, -1] for row in chosen])
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["mamba", "mixtral", "gpt_oss", "rwkv"])
def test_what_has_no_such_matrix_says_what_was_looked_for(model_type: str) -> None:
    with pytest.raises(
        UnknownArchitectureError, match=r"no layer has a linear map .* looked in \w+\.(layers|blocks) \(4 of "
    ):
        ModelAdapter(tiny(model_type))


def test_every_type_is_accounted_for() -> None:
    """What transformers can build is edited in these tests, or stands in the list of what is not, with the reason."""
    described = {name for spec in SPECS for name in spec.model_types}
    edited = {*SAMPLE, *OTHERS, *described}
    left_out = [name for names in LEFT_OUT.values() for name in names.split()]
    assert len(left_out) == len(set(left_out))
    assert not edited & set(left_out)
    if not transformers.__version__.startswith("5.23."):
        pytest.skip("the list is of transformers 5.23; other versions have other types")
    assert set(TYPES) <= edited | set(left_out)


def test_layers_without_an_mlp_are_named() -> None:
    adapter = ModelAdapter(tiny("mimo_v2_flash"))
    assert adapter.editable == (0,)
    with pytest.raises(UnknownArchitectureError, match=r"layer 1 has no module 'mlp\.down_proj' \(layers 0 have\)"):
        adapter.down_proj(1)


@pytest.mark.parametrize(
    ("model_type", "adds"), [("falcon", True), ("lfm2", True), ("qwen2_moe", False), ("minicpm3", False)]
)
def test_a_block_that_changes_what_its_mlp_says_is_told(
    model_type: str, adds: bool, caplog: pytest.LogCaptureFixture
) -> None:
    check_if_new(ModelAdapter(tiny(model_type)))
    assert ("is not what reaches the residual stream" in caplog.text) is not adds


def test_nothing_is_run_to_find_it() -> None:
    config = tiny("olmo2").config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = discover(model)
    assert (found.layers, found.down_proj, found.rows, found.tail) == (
        "model.layers",
        "mlp.down_proj",
        "whole",
        "model",
    )
    with pytest.raises(NothingFoundError, match="no list of layers"):
        discover(_without_layers(model))


def _without_layers(model: torch.nn.Module) -> torch.nn.Module:
    model.model.layers = torch.nn.Identity()  # type: ignore[union-attr,assignment]
    return model


def test_the_command_line_edits_one(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_edit.cli.main import main

    monkeypatch.chdir(tmp_path)
    tiny("granite").save_pretrained("granite")
    tiny_tokenizer().save_pretrained("granite")
    fast = ["--model.editor.init_args.target.steps=5", "--model.statistics.tokens=0", "--trainer.accelerator=cpu"]
    assert main(["fit", "--config=quickstart", "--model=granite", "--limit=2", "--run_name=x", "--quiet", *fast]) == 0
    assert main(["ask", "--run=x", "--tokens=2", "The capital of Italy is"]) == 0
    assert main(["undo", "--run=x", "--last=1"]) == 0
