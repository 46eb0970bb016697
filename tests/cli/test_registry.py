"""The table of commands: the help, the page and the dispatch follow from it; reading commands do without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lit_edit.cli.completion import PARTS
from lit_edit.cli.main import main
from lit_edit.cli.registry import COMMANDS, GROUPS, HELP, Command
from lit_edit.ledger.journal import Journal
from tests.conftest import ROOT, script_of_docs

LIGHTNING = ("fit", "validate", "test")
HEAVY = {"torch", "transformers", "lightning", "datasets", "wandb", "matplotlib", "sklearn"}


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    return script_of_docs("make_commands")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_each_command_is_there(command: Command) -> None:
    assert command.group in GROUPS
    assert callable(command.load())
    assert f"\n  {command.name} " in HELP
    assert command.example.startswith(f"lit-edit {command.name}")


def test_names_are_given_once_and_every_group_has_commands() -> None:
    names = [command.name for command in COMMANDS]
    assert len(set(names)) == len(names)
    assert {command.group for command in COMMANDS} == set(GROUPS)
    assert [line for line in HELP.splitlines() if line.endswith(":")] == [f"{group}:" for group in GROUPS]


@pytest.mark.parametrize(
    ("typed", "near"), [("frobnicate", ""), ("exprot", "did you mean export? "), ("choose_layers", "choose-layers")]
)
def test_an_unknown_command_is_told_the_nearest(typed: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([typed]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"unknown command {typed!r}; " in said
    assert near in said


def test_the_page_is_what_the_script_makes(maker: ModuleType) -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert page == maker.page(), "make it anew: python docs/make_commands.py"
    for command in COMMANDS:
        assert f"\n### {command.name}" in page


def test_the_page_names_what_all_commands_share(maker: ModuleType) -> None:
    """A name that two commands have, and that takes a value, means the same in both or says what it means."""
    own = {"--tasks", "--tokens", "--shots", "--precision", "--config", "--window", "--ckpt_path", "--json", "--last"}
    own |= {"--subject", "--id", "--edit", "--measure", "--split", "--rank", "--devices", "--part", "--factor"}
    homes: dict[str, set[str]] = {}
    for command, _, parser in maker.parsers():
        for action in parser._actions:
            for name in action.option_strings if action.nargs != 0 else ():
                homes.setdefault(name, set()).add(command.name)
    shared = {name for name, commands in homes.items() if len(commands - set(LIGHTNING)) > 1}
    assert shared - set(maker.THINGS) <= own


def imported_by(calls: list[list[str]], folder: Path) -> dict[str, list[str]]:
    """Return, by call of the command line, what it has imported of :data:`HEAVY`."""
    code = f"""
import contextlib, io, json, sys
from lit_edit.cli.main import main
found = {{}}
for call in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            status = main(call)
        except SystemExit as stop:
            status = stop.code
    heavy = sorted({HEAVY!r} & set(sys.modules))
    found[" ".join(call)] = [status, heavy]
print(json.dumps(found))
"""
    words = [sys.executable, "-c", code, json.dumps(calls)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_what_is_refused_names_what_was_typed(capsys: pytest.CaptureFixture[str]) -> None:
    for call in (["fit", "--method", "rme"], ["sweep", "--config", "sweep/editors", "--method", "rme"]):
        assert main(call) == 2
        said = capsys.readouterr().err
        assert "--method rme: no such file, and no method of that name ships" in said
        assert "Did you mean rome" in said


def test_a_subject_without_edits_is_said_to_have_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ledger").mkdir()
    Journal(tmp_path / "ledger" / "journal").append({"kind": "begin"})
    assert main(["log", "--run", str(tmp_path), "--subject", "Nobody"]) == 2
    assert "--subject Nobody: no edit of" in capsys.readouterr().err
    assert main(["log", "--run", str(tmp_path), "--subject", "Nobody", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_what_only_reads_does_without_torch(tmp_path: Path) -> None:
    helps = [[c.name, part, "--help"] if part else [c.name, "--help"]
             for c in COMMANDS if c.name not in LIGHTNING for part in ("", *PARTS.get(c.name, ()))]  # fmt: skip
    good = [["--help"], ["version"], ["models"], ["editors"], ["editors", "D4S"], ["completion", "bash"], *helps]
    bad = [["frobnicate"], ["log", "--run", "nowhere"], ["report", "--run", "nowhere"], ["ask", "--rnu", "x"],
           ["trace", "--limit", "0"], ["study", "mdq"], ["sweep", "--config", "nowhere"],
           ["fit", "--limt", "3"], ["fit", "--config", "quikstart"], ["validate", "--nonsense=3"],
           ["compare", "--config", "compare", "--data", "nowhere"], ["undo", "--run", "x"], ["redo", "--run", "x"],
           ["undo", "--run", "x", "--edit", "abc"], ["undo", "--run", "nowhere", "--last", "1"],
           ["ask", "--run", "nowhere", "Hi"], ["ask", "--run", "x", "Hi"], ["export", "--run", "nowhere"],
           ["ability", "--run", "nowhere"], ["eval-harness", "--run", "nowhere", "--tasks", "sst2"],
           ["plan", "--config", "nowhere"], ["plan", "--limt", "3"], ["stats", "--model", "nowhere"],
           ["trace", "--data", "nowhere"],
           ["apply", "--delta", "nowhere", "--model", "smollm2-135m"], ["fit", "--data", "nowhere.csv"],
           ["fit", "--method", "rme"], ["plan", "--method", "rme"], ["mine-hard", "--method", "rme"],
           ["sweep", "--config", "sweep/editors", "--method", "rme"],
           ["log", "--run", "x", "--subject", "Nobody"]]  # fmt: skip
    (tmp_path / "x" / "ledger").mkdir(parents=True)
    Journal(tmp_path / "x" / "ledger" / "journal").append({"kind": "begin"})
    (tmp_path / "x" / "config.yaml").touch()
    found = imported_by(good + bad, tmp_path)
    assert {call: heavy for call, (_, heavy) in found.items() if heavy} == {}
    assert {status for call, (status, _) in found.items() if call.split() in good} == {0}
    assert {status for call, (status, _) in found.items() if call.split() in bad} == {2}
