"""``lit-edit completion``: asked in the shells themselves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lit_edit.cli.completion import SHELLS, fit_options
from lit_edit.cli.main import main

BASH = """
source <(lit-edit completion bash)
COMP_LINE="$1"; COMP_POINT=${#1}; COMP_TYPE=9; COMPREPLY=()
_python_argcomplete lit-edit
printf '%s\\n' "${COMPREPLY[@]}"
"""
ZSH = """
autoload -Uz compinit; compinit -u -D
source <(lit-edit completion zsh)
_describe() { print -l -- "${(@P)2}" }
BUFFER="$1"; CURSOR=${#BUFFER}; words=(${(z)BUFFER})
_python_argcomplete
"""
FISH = "lit-edit completion fish | source; complete -C $argv[1]"


@pytest.fixture
def ask(tmp_path: Path, request: pytest.FixtureRequest) -> object:
    """Return what a shell offers behind a line, in a folder with one run and one file."""
    shell: str = request.param
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    run = tmp_path / "runs" / "acme"
    run.mkdir(parents=True)
    (run / "config.yaml").touch()
    (tmp_path / "facts.csv").touch()
    script = tmp_path / "lit-edit"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lit_edit "$@"\n')
    script.chmod(0o755)
    words = {
        "bash": ["--norc", "-c", BASH, "bash"],
        "zsh": ["-f", "-c", ZSH, "zsh"],
        "fish": ["--no-config", "-c", FISH],
    }
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}

    def answer(line: str) -> set[str]:
        done = subprocess.run(
            [program, *words[shell], line], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        return {word.strip().partition("\t")[0].rstrip(":") for word in done.stdout.splitlines()} - {""}

    return answer


@pytest.mark.parametrize("ask", SHELLS, indirect=True)
def test_shells_complete_commands_configs_and_runs(ask: object) -> None:
    assert callable(ask)
    assert ask("lit-edit ex") == {"export"}
    assert ask("lit-edit fit --config quick") == {"quickstart"}
    assert ask("lit-edit ask --run ") == {"runs/acme"}


@pytest.mark.parametrize("ask", ["bash"], indirect=True)
def test_bash_completes_the_rest(ask: object) -> None:
    assert callable(ask)
    assert {"fit", "study", "completion"} <= ask("lit-edit ")
    assert {"--help", "--run", "--tokens"} <= ask("lit-edit ask --")
    assert {"mqd", "d4s", "beliefs"} <= ask("lit-edit study ")
    assert ask("lit-edit build mqd --o") == {"--out"}
    assert ask("lit-edit fit --method memit_s") == {"memit_seq"}
    assert "--data.path" in ask("lit-edit fit --data.")
    assert ask("lit-edit plan --model.statistics.to") == {"--model.statistics.tokens"}
    assert ask("lit-edit editors Alpha") == {"AlphaEdit"}
    assert "facts.csv" in ask("lit-edit fit --data fa")
    assert ask("lit-edit frobnicate ") <= {"facts.csv", "lit-edit", "runs", "runs/"}  # the shell's own, or none


def test_completing_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import os, sys; from lit_edit.cli.main import main\n"
        "heavy = {'torch', 'transformers', 'lightning'}\n"
        "os._exit = lambda status: (print(sorted(heavy & set(sys.modules))), sys.exit())\n"
        "main()"
    )
    line = "lit-edit fit --data."
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "said")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--data.limit" in (tmp_path / "said").read_text()


def test_a_shell_that_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["completion", "tcsh"])
    assert stop.value.code == 2
    assert "bash" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_the_options_that_are_offered_are_those_that_are_taken(command: str) -> None:
    """``fit_options`` is a short list of what Lightning's parser and the short forms take."""
    from lit_edit.console.arguments import SHORT
    from lit_edit.console.edit_cli import EditCLI
    from lit_edit.console.fit_parser import FitParser

    if command == "fit":
        taken = set(FitParser()._known())
    else:

        class Parser(EditCLI):
            def parse_arguments(self, *args: object) -> None:
                raise RuntimeError

        with pytest.raises(RuntimeError):
            Parser(command)
        taken = {"--ckpt_path", "--quiet", "--json", "--config", "--print_config", "--runs_dir", "--run_name", *SHORT}
    offered = {name for name in fit_options(command)._option_string_actions if name.startswith("--")}
    assert offered - {"--help"} <= taken | {"--print_config"}
