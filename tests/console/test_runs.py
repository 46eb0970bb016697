"""Which run is meant: a folder, a name below runs/, or none, which is the newest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lit_edit.cli.main import main
from lit_edit.console.arguments import make_parser, newest_run
from lit_edit.errors import ArgumentError
from lit_edit.runs.files import journal_path
from lit_edit.runs.reading import RunError, find_folder


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three folders below runs/, the last of which is no run of edits."""
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("newer", "older", "network")):
        folder = tmp_path / "runs" / name
        journal_path(folder).parent.mkdir(parents=True)
        (folder / "config.yaml").touch()
        os.utime(folder / "config.yaml", (1000 - age, 1000 - age))
        if name != "network":
            journal_path(folder).touch()
    os.utime(tmp_path / "runs" / "network" / "config.yaml", (2000, 2000))
    return tmp_path / "runs"


def test_the_newest_is_meant_and_said(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = make_parser("x", "")
    parser.add_run()
    assert parser.parse_args([]).run == Path("runs/newer")
    assert capsys.readouterr().err == "lit-edit x: --run runs/newer, the newest\n"
    assert parser.parse_args(["--run", "older"]).run == Path("runs/older")
    assert capsys.readouterr().err == ""
    several = make_parser("y", "")
    several.add_run(nargs="+", dest="runs")
    assert several.parse_args([]).runs == [Path("runs/newer")]


def test_a_name_is_looked_for_below_runs(runs: Path) -> None:
    assert find_folder(Path("newer")) == Path("runs/newer")
    assert find_folder(runs / "newer") == runs / "newer"
    (runs.parent / "newer").mkdir()
    assert find_folder(Path("newer")) == Path("newer")  # what is there is meant first
    with pytest.raises(RunError, match=r"no run folder oldr; did you mean older\?"):
        find_folder(Path("oldr"))


def test_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match="there is none below runs/"):
        newest_run()
    for command in ("log", "ask", "undo", "redo", "export", "report", "ability"):
        assert main([command, *(["Hello"] if command == "ask" else [])]) == 2
        assert "name a run, --run FOLDER" in capsys.readouterr().err
