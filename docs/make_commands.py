"""Makes ``docs/commands.md`` from the registry of commands and their parsers: ``python docs/make_commands.py``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lit_edit.cli.completion import PARTS, fit_options
from lit_edit.cli.registry import COMMANDS, GROUPS, Command
from lit_edit.console.arguments import SHORT, CommandParser

PAGE = Path(__file__).with_name("commands.md")
THINGS = {
    "--run": "the folder of a run, `runs/x`",
    "--run_name": "the name of a run, a comparison or a study: of the folder that is made",
    "--runs_dir": "the folder in which such folders are made (`runs`)",
    "--data": "what is read: edits, facts or events, in a file",
    "--limit": "how many of them",
    "--model": "the model: a packaged one, a folder or a hub id",
    "--method": "the editor with its settings: `rome`, `ROME`, `method/rome`, or a YAML file",
    "--layers": "layers: `6 7`, `6,7` or `[6,7]`",
    "--out": "the file or folder that is written",
    "--config": "settings: a YAML file, or the name of one that ships",
    "--seed": "of everything that is drawn",
    "--task_files": "a folder with a file per task of general ability (`--tasks` names the tasks)",
    "--corpus": "text for key statistics (`--texts` of mine-hard is text whose perplexity is measured)",
}
"""What has one name in all commands."""


class _FoundError(Exception):
    """A parser was about to parse."""


def parser_of(command: Command, *words: str) -> CommandParser:
    """Return the parser that a command makes."""
    if command.target.startswith("fit:"):
        return fit_options(command.name)
    found: list[CommandParser] = []

    def stop(parser: CommandParser, *args: Any, **more: Any) -> NoReturn:
        found.append(parser)
        raise _FoundError

    parse, CommandParser.parse_known_args = CommandParser.parse_known_args, stop  # type: ignore[method-assign,assignment]
    try:
        command.load()(list(words))
    except _FoundError:
        return found[0]
    finally:
        CommandParser.parse_known_args = parse  # type: ignore[method-assign,assignment]
    raise AssertionError(f"{command.name} parses nothing")


def parsers() -> Iterator[tuple[Command, str, CommandParser]]:
    """Yield every command, with the name of its part if it has parts, and its parser."""
    for command in COMMANDS:
        for part in PARTS.get(command.name, [""]):
            yield command, part, parser_of(command, *([part] if part else []))


def page() -> str:
    """Return the page."""
    every = list(parsers())
    text = (
        "# Commands\n\nMade by `python docs/make_commands.py` from the commands themselves. `lit-edit COMMAND --help` "
        "says the same; `lit-edit completion` lets Tab complete commands, options, configs, runs and methods.\n\n"
        f"## What is called what\n\n{_names(every)}"
    )
    for group in GROUPS:
        text += f"\n## {group[0].upper()}{group[1:]}\n"
        text += "".join(_section(*found) for found in every if found[0].group == group)
    return text


def _names(every: Sequence[tuple[Command, str, CommandParser]]) -> str:
    former: dict[str, dict[str, None]] = {name: {} for name in THINGS}
    for _, _, parser in every:
        for alias, name in parser._aliases.items():
            if name in former:
                former[name][f"`{alias}`"] = None
    lines = [f"| `{name}` | {text} | {', '.join(former[name])} |\n" for name, text in THINGS.items()]
    return (
        "| name | what | spellings of earlier versions, taken where they were, and settings in full |\n"
        "| --- | --- | --- |\n"
        f"{''.join(lines)}\n"
        "`-` and `_` are one in the names of options. Settings of `lit-edit fit` are named in full wherever settings "
        "may follow (`--data.limit 100`); these have short forms there:\n\n"
        + "".join(f"- `{name}`: {text}\n" for name, text in SHORT.items())
    )


def _section(command: Command, part: str, parser: CommandParser) -> str:
    name = f"{command.name} {part}".strip()
    example = "" if part and not command.example.startswith(f"lit-edit {name} ") else f": `{command.example}`"
    text = f"\n### {name}\n\n{command.line[0].upper()}{command.line[1:]}{example}\n\n"
    if not command.target.startswith("fit:"):
        text += f"{' '.join((parser.description or '').split())}\n\n"
    rows = [_row(parser, action) for action in parser._actions if action.dest != "help"]
    text += "| option | what |\n| --- | --- |\n" + "".join(rows) if rows else "No options.\n"
    if parser._takes_settings:
        text += (
            "\nAny setting of `lit-edit fit` may follow; `lit-edit fit --help` and `lit-edit fit --config quickstart "
            "--print_config` show all, [settings.md](settings.md) explains them.\n"
        )
    return text


def _row(parser: CommandParser, action: argparse.Action) -> str:
    value = action.metavar or ("/".join(map(str, action.choices)) if action.choices else action.dest.upper())
    value = "" if action.nargs == 0 else f" {value} ..." if action.nargs in ("+", "*") else f" {value}"
    value = f" [{value.strip()}]" if action.nargs == "?" and action.option_strings else value
    name = f"{action.option_strings[0]}{value}" if action.option_strings else value.strip()
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    needed = "; must be given" if action.required and action.option_strings else ""
    return f"| `{name}` | {' '.join(text.split())}{needed} |\n".replace("|ID", "/ID")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
