"""``completion``: what a shell is told so that Tab completes commands, options, configs, runs and methods.

The script that is printed asks this program at each Tab; argcomplete talks with the shell. Nothing heavy is imported:
settings are read from the source.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from types import MappingProxyType

from lit_edit.cli.build import DATA_SETS
from lit_edit.cli.registry import BY_NAME
from lit_edit.cli.study import STUDIES
from lit_edit.console.arguments import CommandParser, make_parser, run_folders

SHELLS = ("bash", "zsh", "fish")
PARTS = MappingProxyType({"build": DATA_SETS, "study": STUDIES})
"""Commands that have commands of their own."""


def run_completion(args: list[str]) -> None:
    """Print the script of a shell."""
    parser = make_parser("completion", "Print what a shell reads so that Tab completes lit-edit's arguments.")
    parser.epilog = (
        "bash: lit-edit completion bash >> ~/.bashrc; zsh: lit-edit completion zsh >> ~/.zshrc (behind compinit); "
        "fish: lit-edit completion fish > ~/.config/fish/completions/lit-edit.fish. Shells started then have it."
    )
    parser.add_argument("shell", choices=SHELLS, help="which")
    options = parser.parse_args(args)

    import argcomplete

    sys.stdout.write(argcomplete.shellcode(["lit-edit"], shell=options.shell))


def fit_options(command: str) -> CommandParser:
    """Return the options of ``fit``, ``validate`` or ``test`` that are not settings of a class."""
    parser = make_parser(command, BY_NAME[command].line, settings=True)
    parser.add_config("settings, a YAML file", action="append", default=None)
    parser.add_data("the edits: a file (JSON, JSONL or CSV), or builtin", default=None)
    parser.add_limit("make at most so many")
    parser.add_model(None)
    parser.add_method(None)
    parser.add_layers("which to edit")
    parser.add_out("the run's folder: --runs_dir and --run_name in one")
    parser.add_seed("of everything that is drawn")
    parser.add_runs("<name>", "name of the run; by default the time")
    if command == "fit":
        text = "go on where an earlier run of this name was cut, if there is one"
        parser.add_argument("--resume", choices=("never", "auto"), default="never", help=text)
        parser.add_argument("--continue", metavar="RUN", complete=run_folders, help="begin with the edits of this run")
        parser.add_argument("--overwrite", metavar="true", help="delete an earlier run of this name")
    parser.add_argument(
        "--quiet", action="store_true", help="no bars and tables; warnings, errors, the folder at the end"
    )
    parser.add_argument("--json", action="store_true", help="the same, and one JSON object on standard output")
    parser.add_argument("--ckpt_path", metavar="FILE", help="go on from, or measure, this checkpoint")
    parser.add_argument("--print_config", action="store_true", help="show all settings as they are, and end")
    return parser


def complete_line() -> int:
    """Answer a shell that asks what can stand where the cursor is; return the exit status."""
    from argcomplete.lexers import split_line

    before = split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))[3][1:]
    if not before:
        return _offer(1, BY_NAME)
    command = BY_NAME.get(before[0])
    if command is None:
        return 0
    if command.name in PARTS and len(before) == 1:
        return _offer(2, PARTS[command.name])
    os.environ["_ARGCOMPLETE"] = "3" if command.name in PARTS else "2"  # argcomplete's way to say where options begin
    if command.target.startswith("fit:"):
        fit_options(command.name).parse_args([])
    return command.load()(before[1:]) or 0


def _offer(place: int, names: Iterable[str]) -> int:
    os.environ["_ARGCOMPLETE"] = str(place)
    parser = make_parser("", "")
    parser.add_argument("name", choices=list(names))
    parser.parse_args([])
    return 0
