"""The README's Python, run as written on the real model; its commands, checked against the parser."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lit_edit.cli.main import main
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.model
@pytest.mark.parametrize("code", blocks("python"), ids=["session", "lightning"])
def test_python_blocks_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), scope)  # noqa: S102 - our own README
    if "outcome" in scope:
        assert scope["outcome"].final["efficacy"]["accuracy"] == 1.0
        assert len(scope["outcome"].ledger) == 0  # taken back
    else:
        assert (tmp_path / "my-edited-model" / "model.safetensors").is_file()


def fit_commands() -> list[str]:
    lines = [line.partition("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line.rpartition("&& ")[2] for line in lines if "lit-edit fit" in line and "runs/NAME" not in line]


@pytest.mark.parametrize("command", fit_commands())
def test_fit_commands_parse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*shlex.split(command)[1:], "--print_config"])
    assert stop.value.code == 0
    assert "class_path: lit_edit." in capsys.readouterr().out  # of an editor, or of what trains its network


def test_ci_calls_the_test_command_of_the_readme() -> None:
    commands = [block.strip() for block in blocks("bash")]
    assert "pytest" in commands
    assert "\npytest\n" in (ROOT / ".ci" / "run").read_text()
