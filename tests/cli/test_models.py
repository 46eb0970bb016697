"""``lit-edit models --describe``: what was found of a model, whether it is proven, and a config that says the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lit_edit.cli.main import main
from lit_edit.console.fit_parser import FitParser
from lit_edit.models.adapter import ModelAdapter
from lit_edit.testing import tiny_model, tiny_tokenizer
from tests.models.every_type import tiny

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]

DESCRIBED = {
    "gpt2": ("by its name", "transformer.h", "mlp.c_proj", None, None, "packed"),
    "gemma3_text": ("by its name", "model.layers", "mlp.down_proj", "post_feedforward_layernorm", None, "packed"),
    "olmo2": ("by its structure", "model.layers", "mlp.down_proj", "post_feedforward_layernorm", None, "whole"),
    "granite": ("by its structure", "model.layers", "mlp.down_proj", None, 0.22, "whole"),
    "falcon": ("by its structure", "transformer.h", "mlp.dense_4h_to_h", None, None, "whole"),
}


@pytest.fixture
def folder(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a model's folder."""
    monkeypatch.chdir(tmp_path)

    def make(model_type: str) -> str:
        model = tiny_model(model_type) if model_type in ("gpt2", "gemma3_text") else tiny(model_type)
        model.save_pretrained(model_type)
        tiny_tokenizer().save_pretrained(model_type)
        return f"./{model_type}"

    return make


@pytest.mark.parametrize("model_type", DESCRIBED)
def test_what_was_found_is_told_and_written(model_type: str, folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found, layers, down, norm, scale, rows = DESCRIBED[model_type]
    name = folder(model_type)
    assert main(["models", "--describe", name, "--json", "--out", "found.yaml"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["found"], told["layers"]["path"], told["down_projection"]["path"]) == (found, layers, down)
    assert told["layers"]["count"] == 4
    assert told["behind_it"] == {"norm": norm, "scale": scale}
    assert told["rows"] == rows
    assert (told["proven"], told["fault"]) == (True, None)
    assert main(["models", "--describe", name]) == 0
    text = capsys.readouterr().out
    assert f"found {found})" in text
    assert "proven             yes" in text

    parser = FitParser()
    parser.parse(["--config", "quickstart", "--config", "found.yaml"])
    described = parser.make(bare=True).model.language_model
    model, _ = described.load()
    again, once = ModelAdapter(model, described.arch), ModelAdapter(model)
    for part in ("layers", "down_proj", "norm", "output_norm", "output_scale", "logit_softcap", "tail"):
        assert getattr(again.spec, part) == getattr(once.spec, part)


def test_what_is_not_proven_is_said(folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--describe", folder("qwen2_moe")]) == 0
    assert "NO: what the MLP says is not what reaches the residual stream" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--describe", "./nowhere"], "./nowhere"),
        (["--out", "x.yaml"], "belong to --describe"),
        (["--trust-remote-code"], "belong to --describe"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], told: str, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", *words]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1


def test_what_has_no_mlp_says_what_was_looked_for(folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--describe", folder("mixtral")]) == 2
    assert "no layer has a linear map" in capsys.readouterr().err
