"""``export`` and ``apply`` on the command line."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from lit_edit.cli.main import main
from lit_edit.runs.folder import OpenRun, open_run
from lit_edit.testing import tiny_model, tiny_tokenizer

IDS = torch.tensor([[5, 6, 7, 8, 9]])

pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # peft asks transformers for it
]


@pytest.fixture(scope="module")
def finished_once(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_EDIT_CACHE", str(folder / "cache"))
        args = ["fit", "--config", "quickstart", f"--model.language_model.name={tiny_folder}", "--data.limit=3"]
        args += ["--model.editor.init_args.layers=[1,2]", "--model.editor.init_args.target.steps=4"]
        args += ["--model.editor.init_args.contexts=plain", "--model.statistics.tokens=0"]
        assert main([*args, "--trainer.accelerator=cpu", f"--runs_dir={folder}/runs", "--run_name=x"]) == 0
    return folder / "runs" / "x"


@pytest.fixture
def finished(finished_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a finished run, to do anything with; its key statistics are where the run has left them."""
    monkeypatch.setenv("LIT_EDIT_CACHE", str(finished_once.parents[1] / "cache"))
    return Path(shutil.copytree(finished_once, tmp_path / "runs" / "x"))


@pytest.fixture
def edited(finished: Path) -> torch.Tensor:
    """Logits of the edited model."""
    run = open_run(finished)
    run.apply()
    return logits(run.ledger.adapter.model)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


def export(run: Path, *args: str) -> int:
    return main(["export", "--run", str(run), *args])


def test_every_form_gives_the_edited_models_logits(
    finished: Path, tiny_folder: Path, edited: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("model", "delta", "lora"):
        assert export(finished, "--as", kind) == 0
    out = capsys.readouterr().out
    for place in ("edited", "edited.safetensors", "lora"):
        assert str(finished / place) in out
    assert "rank 3 holds the edits to float32 round-off" in out
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert not torch.allclose(logits(base), edited, atol=1e-4)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(finished / "edited")), edited)
    command = next(line for line in out.splitlines() if "lit-edit apply" in line)  # as it is printed
    assert main([*shlex.split(command)[1:], "--to", str(finished / "applied")]) == 0
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(finished / "applied")), edited)
    adapted = PeftModel.from_pretrained(base, str(finished / "lora"))
    torch.testing.assert_close(logits(adapted), edited, rtol=0, atol=1e-5)


def test_edits_that_were_taken_out_are_not_taken_away(
    finished: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["undo", "--run", str(finished), "--last", "1"]) == 0
    for kind in ("delta", "lora"):
        assert export(finished, "--as", kind) == 0
    assert "rank 2 holds the edits" in capsys.readouterr().out
    run = open_run(finished)
    run.apply()
    with safe_open(finished / "edited.safetensors", "pt") as file:
        assert len(json.loads(file.metadata()["edits"])) == len(run.entries) == 2
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), str(finished / "lora"))
    torch.testing.assert_close(logits(adapted), logits(run.ledger.adapter.model), rtol=0, atol=1e-5)
    assert main(["undo", "--run", str(finished), "--last", "2"]) == 0
    for kind in ("delta", "lora"):
        assert export(finished, "--as", kind, "--to", str(finished / "nothing")) == 2
        assert "no edit holds" in capsys.readouterr().err
    assert not (finished / "nothing").exists()


def test_the_model_is_what_export_makes_unasked(finished: Path, tmp_path: Path, edited: torch.Tensor) -> None:
    assert export(finished, "--to", str(tmp_path / "out")) == 0
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), edited)


def test_an_applied_delta_has_a_card_and_a_tokenizer(finished: Path, tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "acme.safetensors"
    assert export(finished, "--as", "delta", "--to", str(path)) == 0
    assert main(["apply", "--delta", str(path), "--model", str(tiny_folder)]) == 0
    folder = tmp_path / "acme"  # the file without its suffix
    assert "Vienna" in (folder / "README.md").read_text()
    assert "with 3 facts changed" in (folder / "README.md").read_text()
    assert (folder / "tokenizer.json").is_file()


@pytest.mark.parametrize("kind", ["model", "lora"])
def test_hostile_texts_cannot_leave_the_card(finished: Path, tmp_path: Path, kind: str) -> None:
    rows = [json.loads(row) for row in (finished / "ledger" / "edits.jsonl").read_text().splitlines()]
    rows[0] |= {"subject": "../../<img src=x onerror=alert(1)>", "target_new": "`\n---\n| [x](javascript:y) |"}
    (finished / "ledger" / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (finished / "ledger" / "journal").unlink()  # the list is what a run without one is read from
    assert export(finished, "--as", kind, "--to", str(tmp_path / "out")) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "../../&lt;img src=x onerror=alert(1)&gt;" in card
    assert "<img" not in card
    assert "[x](" not in card.replace("\\[x\\](", "")
    assert card.count("\n---\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs"]


def test_a_truncated_adapter_says_what_it_costs(
    finished: Path, tiny_folder: Path, edited: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(finished, "--as", "lora", "--rank", "1") == 0
    out = capsys.readouterr().out
    assert "adapter of rank 1 is an approximation: nothing would be lost at rank 3" in out
    assert "model.layers.1.mlp.down_proj.weight: 0." in out
    for row in ("efficacy success", "generalization accuracy", "locality agreement"):
        assert row in out
    assert "3 edits" in out
    assert "edited model" in out
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), str(finished / "lora"))
    assert not torch.allclose(logits(adapted), edited, atol=1e-4)


def test_a_truncated_adapter_of_a_run_without_requests(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(OpenRun, "requests", [])
    assert export(finished, "--as", "lora", "--rank", "2") == 0
    out = capsys.readouterr().out
    assert "cannot be measured" in out
    assert (finished / "lora" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(("kind", "message"), [("model", "not empty"), ("delta", "is a folder"), ("lora", "not empty")])
def test_what_exists_is_not_overwritten(finished: Path, tmp_path: Path, kind: str, message: str, capsys: Any) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.tex").write_text("years of work")
    assert export(finished, "--as", kind, "--to", str(tmp_path / "there")) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["thesis.tex"]
    for target in (tmp_path / "there" / "thesis.tex", tmp_path / "there" / "thesis.tex" / "below"):
        assert export(finished, "--as", kind, "--to", str(target)) == 2
        assert "Traceback" not in capsys.readouterr().err
    assert (tmp_path / "there" / "thesis.tex").read_text() == "years of work"


def test_apply_does_not_overwrite(finished: Path, tiny_folder: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "edited"  # no suffix: the folder would have the file's own name
    assert export(finished, "--as", "delta", "--to", str(path)) == 0
    before = path.read_bytes()
    for target in ([], ["--to", str(path)], ["--to", str(finished)]):
        assert main(["apply", "--delta", str(path), "--model", str(tiny_folder), *target]) == 2
        assert "name a" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_a_delta_on_another_model_is_refused(finished: Path, tmp_path: Path, capsys: Any) -> None:
    other, path = tmp_path / "other", tmp_path / "x.safetensors"
    tiny_model(seed=1).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    assert export(finished, "--as", "delta", "--to", str(path)) == 0
    with safe_open(path, "pt") as file:
        wanted = file.metadata()["base_hash"]
    assert main(["apply", "--delta", str(path), "--model", str(other), "--to", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "belongs to other base weights" in err
    assert wanted in err
    assert "Load exactly the weights it was made on" in err
    assert not (tmp_path / "out").exists()


def test_a_model_stored_in_another_type_is_loaded_as_it_was(finished: Path, tmp_path: Path) -> None:
    """The run read float32 out of a folder; a copy of that folder in float64 holds the same weights."""
    wide, path = tmp_path / "wide", tmp_path / "x.safetensors"
    tiny_model(dtype=torch.float64).save_pretrained(wide)
    tiny_tokenizer().save_pretrained(wide)
    assert export(finished, "--as", "delta", "--to", str(path)) == 0
    assert main(["apply", "--delta", str(path), "--model", str(wide), "--to", str(tmp_path / "out")]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["apply", "--delta", "gone.safetensors", "--model", "smollm2-135m"], "gone.safetensors cannot be read"),
        (["export", "--run", "runs/gone"], "there is no run folder"),
        (["export", "--run", "runs/gone", "--as", "delta"], "there is no run folder"),
    ],
)
def test_what_is_not_there(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--as", "pickle"], "invalid choice: 'pickle'"),
        (["--as", "lora", "--rank", "0"], "must be at least 1, got 0"),
        (["--as", "lora", "--rank", "few"], "--rank"),
        (["--as", "delta", "--rank", "3"], "--rank belongs to --as lora"),
        (["--rank", "3"], "--rank belongs to --as lora"),
    ],
)
def test_bad_arguments(finished: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        export(finished, *args)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_home_folder_is_understood(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert export(finished, "--as=delta", "--to=~/deltas/x.safetensors") == 0
    assert (tmp_path / "home" / "deltas" / "x.safetensors").is_file()
    assert not (tmp_path / "~").exists()
