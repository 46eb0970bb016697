"""Runs that go on from the edits of another one, and what changes behind them."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lit_edit.cli.main import main
from lit_edit.ledger.journal import Journal
from lit_edit.report.reading import read_run
from lit_edit.runs.files import deltas_path, journal_path
from lit_edit.runs.folder import read_history
from tests.cli.test_main import FAST
from tests.runs.life import Processes, contents, held, left_by, same_as, words


def test_a_run_goes_on_from_the_edits_of_another(
    finished: Path, shared: Path, processes: Processes, runs: Path, fit: Any, tmp_path: Path, capsys: Any
) -> None:
    assert main(["undo", f"--run={finished}", "--edit=3", "--no-measure"]) == 0
    carried = load_file(deltas_path(finished))
    before = contents(finished)
    args = [f"--continue={finished}", "--data.offset=4", "--data.limit=3", "--data.batch_size=2"]
    assert fit("--run_name=y", *args) == 0
    assert contents(finished) == before
    history = read_history(runs / "y")
    ids = [entry.id for entry in history.made]
    old = [entry.id for entry in read_history(finished).made]
    assert ids[:4] == [f"x/{name}" for name in old]
    assert len(ids) == 7
    assert held(runs / "y") == [1, 2, 4, 5, 6, 7]
    summary = json.loads((runs / "y" / "summary.json").read_text())
    assert (summary["edits"], summary["undone"]) == (6, 1)
    # 0 is the model before any edit; the others have the numbers that log and undo know them by.
    assert [row["step"] for row in left_by(runs / "y")["metrics"]] == ["0", "6", "7"]
    assert list(read_run(runs / "y").rows) == [0, 6, 7]  # what the report draws

    # A run of that kind that is cut goes on as well, also from its journal alone.
    args = [*words(shared / "fast.yaml"), *args, "--runs_dir", str(runs), "--run_name=z", "--resume=auto"]
    assert processes.run(args, tmp_path, ("write", 5)) == -signal.SIGKILL
    assert processes.run(args, tmp_path, ("commit", 1)) == -signal.SIGKILL
    assert processes.run(args, tmp_path) == 0, (tmp_path / "child.log").read_text()
    assert same_as(runs / "z", runs / "y") == []

    capsys.readouterr()
    assert main(["undo", f"--run={runs / 'y'}", "--id=x/" + old[0], "--edit=5-7", "--exact"]) == 0
    assert held(runs / "y") == [2, 4]
    assert main(["export", f"--run={runs / 'y'}", f"--to={tmp_path / 'out'}"]) == 0
    assert "with 2 facts changed" in (tmp_path / "out" / "README.md").read_text()
    assert not all(torch.equal(carried[n], value) for n, value in load_file(deltas_path(runs / "y")).items())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.editor.init_args.covariance_weight=6"], "made with other settings (covariance_weight 5.0, now 6.0"),
        (["--continue=gone"], "there is no run folder"),
    ],
)
def test_editing_further_wants_the_same_editor(
    args: list[str], message: str, finished: Path, fit: Any, capsys: Any
) -> None:
    before = contents(finished)
    assert fit("--run_name=y", f"--continue={finished}", "--data.offset=4", *args) == 2
    assert message in capsys.readouterr().err
    assert contents(finished) == before


def facts_file(folder: Path, first: str = "Jane Doe") -> Path:
    path = folder / "facts.csv"
    path.write_text(
        f"prompt,subject,target_new\nThe chief of Acme is,Acme,{first}\nThe capital of Peru is,Peru,Oslo\n"
        "The capital of Chad is,Chad,Rome\n"
    )
    return path


def test_data_that_have_changed_behind_a_run_are_refused(
    tiny_folder: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Ids may stay the same (they are numbers of lines) while the facts change."""
    monkeypatch.chdir(tmp_path)
    args = ["fit", "--config", "quickstart", f"--model.language_model.name={tiny_folder}", *FAST]
    args += ["--data.source=facts", f"--data.path={facts_file(tmp_path)}", "--run_name=x", "--trainer.accelerator=cpu"]
    assert main([*args, "--trainer.max_steps=2"]) == 0
    facts_file(tmp_path, "Bob Smith")
    capsys.readouterr()
    assert main([*args, "--resume=auto"]) == 2
    told = capsys.readouterr().err
    assert "edit 'fact-1' was made with other data (target_new 'Jane Doe', now 'Bob Smith')" in told
    shutil.rmtree(tmp_path / "runs" / "x" / "checkpoints")  # from the journal alone it is seen as well
    assert main([*args, "--resume=auto"]) == 2
    assert "target_new 'Jane Doe', now 'Bob Smith'" in capsys.readouterr().err
    facts_file(tmp_path)
    assert main([*args, "--resume=auto"]) == 0


def test_continuing_never_deletes_what_it_continues(
    tiny_folder: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["fit", "--config", "quickstart", f"--model.language_model.name={tiny_folder}", *FAST, "--data.limit=2"]
    args += ["--trainer.accelerator=cpu"]
    assert main([*args, "--run_name=x"]) == 0
    left = sorted(str(path) for path in (tmp_path / "runs").rglob("*"))
    for source, told in (("runs/x", "a run cannot continue itself"), ("runs/typo", "there is no run folder")):
        assert main([*args, "--run_name=x", f"--continue={source}", "--overwrite=true"]) == 2
        assert told in capsys.readouterr().err
        assert sorted(str(path) for path in (tmp_path / "runs").rglob("*")) == left
    assert main([*args, "--run_name=y", "--trainer.max_steps=1"]) == 0
    assert main([*args, "--run_name=y", "--continue=runs/x", "--resume=auto"]) == 2
    assert "has begun already, with none" in capsys.readouterr().err


@pytest.fixture
def small_run(tiny_folder: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A finished run ``x`` of three edits, as the arguments that make it."""
    monkeypatch.chdir(tmp_path)
    args = ["fit", "--config", "quickstart", f"--model.language_model.name={tiny_folder}", *FAST, "--data.limit=3"]
    args += ["--trainer.accelerator=cpu", "--run_name=x"]
    assert main(args) == 0
    return args


def test_lost_deltas_are_made_from_the_journal(small_run: list[str]) -> None:
    run = Path("runs/x")
    before = load_file(deltas_path(run))
    deltas_path(run).unlink()
    assert main(["ask", "--run", "runs/x", "The capital of Italy is", "--tokens", "2"]) == 0
    after = load_file(deltas_path(run))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_undo_keeps_what_was_measured_before(small_run: list[str]) -> None:
    shutil.rmtree("runs/x/checkpoints")
    path = Path("runs/x/ledger/edits.jsonl")
    before = [json.loads(row) for row in path.read_text().splitlines()]
    assert main(["undo", "--run", "runs/x", "--edit", "2", "--no-measure"]) == 0
    after = [json.loads(row) for row in path.read_text().splitlines()]
    for old, new in zip(before, after, strict=True):
        assert {k: v for k, v in old.items() if k.startswith("immediate_")} == {
            k: v for k, v in new.items() if k.startswith("immediate_")
        }
    assert "immediate_accuracy" in after[0]


def test_a_checkpoint_behind_its_run_is_measured_with_a_warning(
    small_run: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["undo", "--run", "runs/x", "--edit", "2", "--no-measure"]) == 0
    measure = ["validate", *small_run[1:-1], "--ckpt_path=runs/x/checkpoints/last.ckpt"]
    assert main(measure) == 0
    assert "is behind its run by 1 changes" in caplog.text


def test_an_undo_behind_damage_is_told_to_be_lost(small_run: list[str], caplog: pytest.LogCaptureFixture) -> None:
    assert main(["undo", "--run", "runs/x", "--last", "2", "--no-measure"]) == 0
    path = journal_path(Path("runs/x"))
    second = Journal(path)._places[2].offset
    data = bytearray(path.read_bytes())
    data[second + 2000] ^= 1
    path.write_bytes(data)
    assert main([*small_run, "--resume=auto"]) == 0
    assert "undo of edit 2, 3 will NOT: repeat it by hand" in caplog.text
    assert len(read_history(Path("runs/x")).live) == 3
