"""A home folder that is nobody's is refused in one line, wherever a path is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_edit.cli.main import main

NOBODY = "~nobody-of-this-name/x"
COMMANDS = [
    ["log", "--run", NOBODY],
    ["undo", "--run", NOBODY, "--edit", "1"],
    ["ask", "--run", NOBODY, "Italy is"],
    ["export", "--run", NOBODY],
    ["ability", "--run", NOBODY],
    ["report", "--run", NOBODY],
    ["apply", "--delta", NOBODY, "--model", "smollm2-135m"],
    ["trace", "--data", NOBODY],
    ["build", "mqd", "--out", NOBODY],
    ["fit", "--data", NOBODY],
    ["fit", "--config", "quickstart", "--runs_dir", NOBODY],
    ["fit", "--config", f"{NOBODY}.yaml"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=[f"{c[0]} {c[-2]}" for c in COMMANDS])
def test_nobodys_home_is_refused(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = main(command)
    except SystemExit as stopped:
        status = stopped.code
    err = capsys.readouterr().err.strip().splitlines()
    assert status == 2
    assert "nobody-of-this-name" in err[-1]
    assert "Traceback" not in "".join(err)
    assert not list(tmp_path.iterdir())
