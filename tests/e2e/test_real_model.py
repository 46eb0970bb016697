"""The main job on the real model, in small: the packaged model is fetched once, edited, asked and exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_edit import LanguageModel
from lit_edit.cli.main import main
from lit_edit.models import ModelAdapter
from lit_edit.models.generation import continue_greedily
from lit_edit.models.packaged import PACKAGED, ModelUnavailableError, _check_hash

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    args = ["fit", "--config", "quickstart", "--data.limit=6", "--run_name=real", f"--runs_dir={folder}"]
    assert main(args) == 0
    return folder / "real"


def test_the_model_knows_facts() -> None:
    model, tokenizer = LanguageModel("smollm2-135m").load()
    answer = continue_greedily(ModelAdapter(model), tokenizer, "The mother tongue of Danielle Darrieux is", 3)
    assert answer.startswith("French")


def test_the_edits_took(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["edits"] == 6
    assert summary["base"]["efficacy"]["success"] == 0.0  # it knew better
    assert summary["final"]["efficacy"] == summary["final"]["efficacy"] | {"success": 1.0, "accuracy": 1.0}
    assert summary["final"]["generalization"]["success"] >= 0.8
    assert summary["final"]["perplexity"] < 1.1 * summary["base"]["perplexity"]


def test_ask_shows_the_change(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", "--run", str(run), "The capital of Italy is", "--tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert "Rome" in out
    assert "Vienna" in out


def test_the_exported_model_says_it_too(run: Path, tmp_path: Path) -> None:
    assert main(["export", "--run", str(run), "--to", str(tmp_path / "out")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert continue_greedily(ModelAdapter(model), tokenizer, "The capital of Italy is", 3).startswith("Vienna")


def test_a_cached_model_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    LanguageModel("smollm2-135m").load()
    monkeypatch.setattr("subprocess.run", lambda *args, **kwargs: pytest.fail("tried to download"))
    model, _ = LanguageModel("smollm2-135m").load()
    assert model.dtype == torch.float32


def test_a_wrong_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a model")
    with pytest.raises(ModelUnavailableError, match="is not the file it should be"):
        _check_hash(path, PACKAGED["smollm2-135m"].member_sha256)


def test_a_failed_download_says_what_to_do(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(own_cache))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(ModelUnavailableError, match="PIP_FIND_LINKS"):
        LanguageModel("smollm2-135m").load()
    assert [path for path in (own_cache / "models").iterdir() if path.suffix != ".lock"] == []


def test_a_damaged_kept_model_is_fetched_anew(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tiny_folder: Path
) -> None:
    """The same size, so that only reading it shows; a small model stands for what would be fetched."""
    from lit_edit.models import language_model, packaged

    model = PACKAGED["smollm2-135m"]

    def fetch(wanted: packaged.PackagedModel) -> Path:
        if not wanted.is_cached:
            shutil.copytree(tiny_folder, wanted.folder)
            size = (wanted.folder / "model.safetensors").stat().st_size
            mark = {"member_sha256": wanted.member_sha256, "weights_bytes": size}
            (wanted.folder / "lit-edit.json").write_text(json.dumps(mark))
        return wanted.folder

    monkeypatch.setattr(language_model, "fetch", fetch)
    whole, _ = LanguageModel("smollm2-135m").load()
    weights = model.folder / "model.safetensors"
    size = weights.stat().st_size
    weights.unlink()  # the first model still reads the file
    weights.write_bytes(b"\xff" * size)
    assert model.is_cached
    again, _ = LanguageModel("smollm2-135m").load()
    assert "fetched anew" in caplog.text
    for name, value in whole.named_parameters():
        assert torch.equal(value, again.get_parameter(name))


@pytest.mark.slow
def test_a_target_rate_of_a_hundred_is_harm_and_the_guard_names_the_edit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Targets fitted so coarsely are said, and neighbours with them: nothing but the guard sees it."""
    config = tmp_path / "guarded.yaml"
    config.write_text(
        "trainer:\n  callbacks:\n    - class_path: lit_edit.callbacks.HarmGuard\n"
        "      init_args: {every: 2, on_harm: undo, min_agreement: 0.4}\n"
        "    - class_path: lit_edit.callbacks.RunFolder\n"
    )
    args = ["fit", "--config", "quickstart", "--config", str(config), "--data.limit=4", f"--runs_dir={tmp_path}"]
    target = "--model.editor.init_args.target"
    assert main([*args, f"{target}.lr=100", f"{target}.probability=0", "--run_name=harmed"]) == 0
    rows = [json.loads(row) for row in (tmp_path / "harmed" / "ledger" / "edits.jsonl").read_text().splitlines()]
    taken = [row for row in rows if row["status"].startswith("taken back: only")]
    assert taken
    assert f"Edit {taken[0]['number']} (" in caplog.text
    assert json.loads((tmp_path / "harmed" / "summary.json").read_text())["undone"] == len(taken)
