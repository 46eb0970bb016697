"""Where a run goes on, and what it refuses to go on with."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lit_edit.callbacks import EditProgressBar
from safetensors.torch import load_file, save_file

from lit_edit.cli.main import main
from lit_edit.ledger.journal import Journal
from lit_edit.runs.files import deltas_path, journal_path
from lit_edit.runs.folder import read_history
from tests.runs.life import EDITS, Processes, contents, same_as, words


def test_resume_without_a_name_finds_the_run_by_its_settings(killed: Path, fit: Any, whole: Path) -> None:
    assert fit("--resume=auto") == 0
    assert [path.name for path in killed.parent.iterdir()] == ["x"]
    assert same_as(killed, whole) == []


def test_resume_with_the_config_of_a_run_finds_that_run(
    killed: Path, fit: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert fit("--resume=auto", config=killed / "config.yaml") == 0
    assert same_as(killed, whole) == []
    assert list(elsewhere.iterdir()) == []


def test_resuming_again_takes_the_newest_checkpoint(
    killed: Path, fit: Any, whole: Path, shared: Path, processes: Processes, tmp_path: Path
) -> None:
    """What the first resume began from may be gone by then."""
    (killed / "checkpoints" / "epoch=0-step=2.ckpt").unlink()
    args = words(killed / "config.yaml", "--resume=auto")
    assert processes.run(args, tmp_path, ("commit", 1)) == -signal.SIGKILL
    (killed / "checkpoints" / "epoch=0-step=1.ckpt").unlink()
    assert fit("--resume=auto", config=killed / "config.yaml") == 0
    assert same_as(killed, whole) == []


def test_resume_with_other_settings_begins_another_run(killed: Path, fit: Any) -> None:
    recorded = journal_path(killed).read_bytes()
    assert fit("--resume=auto", "--model.editor.init_args.covariance_weight=6") == 0
    assert len(list(killed.parent.iterdir())) == 2
    assert journal_path(killed).read_bytes() == recorded


@pytest.mark.parametrize("checkpoints", [True, False])
def test_the_bar_of_a_resumed_run_knows_its_total_and_its_rate(
    checkpoints: bool, killed: Path, fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not checkpoints:
        shutil.rmtree(killed / "checkpoints")
    seen: list[tuple[int, int, int | None]] = []
    end = EditProgressBar.on_train_batch_end

    def look(bar: EditProgressBar, *args: Any) -> None:
        end(bar, *args)
        seen.append((bar.train_progress_bar.n, bar.train_progress_bar.initial, bar.train_progress_bar.total))

    monkeypatch.setattr(EditProgressBar, "on_train_batch_end", look)
    assert fit("--run_name=x", "--resume=auto", "--trainer.enable_progress_bar=true") == 0
    last, first, total = seen[-1]
    assert (last, total) == (EDITS, EDITS)
    assert 2 <= first < EDITS  # the rate is of the edits that this process has made


def test_resume_where_there_is_nothing_begins(runs: Path, fit: Any, whole: Path) -> None:
    assert fit("--resume=auto", "--run_name=x") == 0
    assert same_as(runs / "x", whole) == []


@pytest.mark.parametrize("named", [True, False])
def test_a_run_that_has_ended_is_left_alone(finished: Path, fit: Any, named: bool, capsys: Any) -> None:
    before = contents(finished)
    assert fit("--resume=auto", *(["--run_name=x"] if named else [])) == 0
    assert contents(finished) == before
    assert "has come to its end already" in capsys.readouterr().out
    assert [path.name for path in finished.parent.iterdir()] == ["x"]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--data.offset=1"], "resume with the data it was made with"),
        (["--data.limit=2"], "resume with the data it was made with"),
        (["--data.shuffle_seed=3"], "resume with the data it was made with"),
        (["--seed_everything=7"], "made with other settings (seed_everything 0, now 7)"),
        (["--model.editor.init_args.covariance_weight=6"], "made with other settings (covariance_weight 5.0, now 6.0)"),
        (["--model.editor.init_args.target.steps=4"], "made with other settings (target.steps 3, now 4)"),
        (["--model.statistics.tokens=9"], "made with other settings (model.statistics.tokens 0, now 9)"),
        (["--model.language_model.name=gone"], "now 'gone')"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_run_that_has_ended_refuses_what_a_cut_one_refuses(
    args: list[str], told: str, finished: Path, fit: Any, capsys: Any
) -> None:
    before = contents(finished)
    assert fit("--run_name=x", "--resume=auto", *args) == 2
    assert told in capsys.readouterr().err
    assert contents(finished) == before


def test_another_seed_is_refused_on_a_cut_run_too(killed: Path, fit: Any, capsys: Any) -> None:
    before = contents(killed)
    assert fit("--run_name=x", "--resume=auto", "--seed_everything=7") == 2
    assert "made with other settings (seed_everything 0, now 7)" in capsys.readouterr().err
    assert contents(killed)["ledger/journal"] == before["ledger/journal"]


@pytest.mark.parametrize("checkpoints", [True, False])
def test_more_data_behind_the_same_beginning_is_gone_on_with(
    checkpoints: bool,
    finished: Path,
    shared: Path,
    processes: Processes,
    fit: Any,
    runs: Path,
    tmp_path: Path,
    capsys: Any,
) -> None:
    """Whole windows: as one run of all of them, but for the measurements at the first end."""
    assert fit("--run_name=long", "--data.limit=6") == 0
    if not checkpoints:
        shutil.rmtree(finished / "checkpoints")
    args = [*words(shared / "fast.yaml"), "--runs_dir", str(runs), "--run_name=x", "--resume=auto", "--data.limit=6"]
    assert processes.run(args, tmp_path, ("commit", 1 if checkpoints else 5)) == -signal.SIGKILL
    assert len(read_history(finished).made) == 5
    assert fit("--run_name=x", "--resume=auto", "--data.limit=6") == 0
    assert "has come to its end already" not in capsys.readouterr().out
    assert len(read_history(finished).made) == 6
    one, other = load_file(deltas_path(finished)), load_file(deltas_path(runs / "long"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (finished, runs / "long")]
    assert summaries[0]["final"] == summaries[1]["final"]
    assert summaries[0]["edits"] == 6
    before = contents(finished)
    assert fit("--run_name=x", "--resume=auto", "--data.limit=6") == 0
    assert "has come to its end already" in capsys.readouterr().out
    assert contents(finished) == before


def test_an_ended_run_is_not_run_again_unasked(finished: Path, fit: Any, capsys: Any) -> None:
    before = contents(finished)
    assert fit("--run_name=x") == 2
    assert "go on where it was cut with --resume auto" in capsys.readouterr().err
    assert contents(finished) == before


def test_changed_base_weights_are_refused(
    shared: Path, tiny_folder: Path, runs: Path, fit: Any, tmp_path: Path, capsys: Any
) -> None:
    model = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    name = f"--model.language_model.name={model}"
    assert fit("--run_name=x", name, "--data.limit=2") == 0
    folder = runs / "x"
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-6
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    shutil.rmtree(folder / "checkpoints")
    for end in ("with the end", "without"):
        if end == "without":  # for a run that has ended there is nothing to do
            journal = Journal(journal_path(folder))
            journal._cut(journal._places[-2].offset + journal._places[-2].length)
        before = contents(folder)
        commands = [["undo", "--last=1"], ["ask", "Hello there"]]
        statuses = [main([*args, f"--run={folder}"]) for args in commands]
        if end == "without":
            statuses.append(fit("--run_name=x", "--resume=auto", name, "--data.limit=2"))
        err = capsys.readouterr().err
        assert set(statuses) == {2}
        assert err.count("other base weights") == len(statuses), err
        after = contents(folder)
        assert {name for name in after if after[name] != before.get(name)} <= {"metrics.csv", *checkpoints_in(after)}
        assert after.keys() >= before.keys()


def checkpoints_in(names: Iterable[str]) -> set[str]:
    """What a run that fails at its start may leave: a checkpoint of nothing."""
    return {name for name in names if name.startswith("checkpoints/")}


def test_a_checkpoint_of_other_base_weights_is_refused(
    killed: Path, shared: Path, tiny_folder: Path, fit: Any, tmp_path: Path, capsys: Any
) -> None:
    model = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-6
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    recorded = journal_path(killed).read_bytes()
    assert fit("--run_name=x", "--resume=auto", f"--model.language_model.name={model}") == 2
    assert "other base weights" in capsys.readouterr().err
    assert journal_path(killed).read_bytes() == recorded


@pytest.mark.parametrize("checkpoints", [True, False])
def test_other_settings_are_refused_by_name_and_the_run_stays_as_it_is(
    checkpoints: bool, killed: Path, fit: Any, whole: Path, capsys: Any
) -> None:
    if not checkpoints:
        shutil.rmtree(killed / "checkpoints")
    before = contents(killed)
    assert fit("--run_name=x", "--resume=auto", "--model.editor.init_args.covariance_weight=6") == 2
    assert "made with other settings (covariance_weight 5.0, now 6.0" in capsys.readouterr().err
    after = contents(killed)
    assert after["config.yaml"] == before["config.yaml"]
    assert after["ledger/journal"] == before["ledger/journal"]
    assert fit("--resume=auto", config=killed / "config.yaml") == 0
    assert same_as(killed, whole) == []


def test_other_data_is_refused(killed: Path, fit: Any, capsys: Any) -> None:
    recorded = journal_path(killed).read_bytes()
    assert fit("--run_name=x", "--resume=auto", "--data.offset=1") == 2
    assert "resume with the data it was made with" in capsys.readouterr().err
    assert journal_path(killed).read_bytes() == recorded
