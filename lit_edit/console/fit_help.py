"""What ``lit-edit fit --help`` shows: what one needs first, the editor's settings, and Lightning's at the end."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from lightning.pytorch.cli import LightningArgumentParser

from lit_edit.console.arguments import SHORT
from lit_edit.console.catalogue import KnownEditor, known_editors, settings_told
from lit_edit.console.configs import find_config
from lit_edit.errors import ArgumentError

FITTED = "D4S"
"""The editor whose settings are shown where no other is chosen."""
_EXAMPLES = """examples:
  lit-edit fit                                     fifty-eight facts that come with it, on a small model
  lit-edit fit --data facts.csv --model MODEL      your facts, your model (a folder, a hub id, a packaged one)
  lit-edit fit --config counterfact --method rome  a config by its name, and another editor
  lit-edit fit --run_name x --resume auto          begin the run x, or go on where it was cut
"""


class SettingsParser(LightningArgumentParser):
    """A parser with a long list of settings: the help begins with those that one needs."""

    chosen: Sequence[str] = ()
    """The words of the command line, which may choose an editor."""

    foreword = ""
    """Lines, as they are, behind what the command does."""

    def format_help(self, *args: Any) -> str:
        """Return the help: usage, examples, options, data, model, editor, and the Trainer's at the end."""
        trainer = [group for group in self._action_groups if _is_trainer(group)]
        kept, epilog, self.epilog = self._action_groups, self.epilog, None
        try:
            self._action_groups = sorted((g for g in kept if g not in trainer), key=_place)
            first = str(super().format_help(*args)).replace("\noptions:\n", f"\n{self.foreword}\noptions:\n", 1)
        finally:
            self._action_groups, self.epilog = kept, epilog
        formatter = self._get_formatter()
        for group in trainer:
            formatter.start_section("Settings of Lightning's Trainer, of which few matter here")
            formatter.add_arguments(group._group_actions)
            formatter.end_section()
        own = "\n".join(editor_help(editor_named(self.chosen)))
        return _without_markup(f"{first}\n{own}\n\n{formatter.format_help()}")


def describe(parser: argparse.ArgumentParser, command: str, about: str) -> None:
    """Give a command's parser a usage of one line, what it does, and the short forms of its settings."""
    parser.usage = f"lit-edit {command} [--config NAME ...] [--SHORT VALUE ...] [--NAME.OF.A.SETTING VALUE ...]"
    parser.description = about
    if isinstance(parser, SettingsParser):
        short = "\n".join(f"  {name:<10}{text}" for name, text in SHORT.items())
        parser.foreword = f"{_EXAMPLES if command == 'fit' else ''}\nshort forms of settings:\n{short}\n".lstrip()


def editor_named(words: Sequence[str]) -> KnownEditor:
    """Return the editor that arguments choose, as far as it can be seen without parsing them; D4S where none does."""
    name = FITTED
    for option, value in _pairs(words):
        if option == "--config":
            name = _editor_of(value) or name
        elif option == "--model.editor":
            name = value.rpartition(".")[2]
    by_name = {editor.name.lower(): editor for editor in known_editors()}
    return by_name.get(name.lower(), by_name[FITTED.lower()])


def editor_help(editor: KnownEditor) -> Iterator[str]:
    """Yield the lines of the help on an editor's settings."""
    yield f"Settings of the editor {editor.name} (--method takes another; lit-edit editors lists them):"
    yield from settings_told(editor, "  --model.editor.init_args.")


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if equals:
            yield name, value
        elif place + 1 < len(words):
            yield name, words[place + 1]


def _editor_of(config: str) -> str | None:
    """Return the class that a config chooses, if it can be read and does."""
    try:
        with open(find_config(config), encoding="utf-8") as file:
            found: Any = yaml.safe_load(file)
        return str(found["model"]["editor"]["class_path"]).rpartition(".")[2]
    except (ArgumentError, OSError, yaml.YAMLError, KeyError, TypeError):
        return None


def _is_trainer(group: Any) -> bool:
    return any(re.match(r"--trainer(\.|$)", name) for action in group._group_actions for name in action.option_strings)


def _place(group: Any) -> int:
    """Return where a group stands: the command's own options, then data, model, and the rest."""
    names = [name for action in group._group_actions for name in action.option_strings]
    for place, beginning in enumerate(("-h", "--data", "--model.editor", "--model", "--ckpt_path")):
        if any(name == beginning or name.startswith(f"{beginning}.") for name in names):
            return place
    return 9


def _without_markup(text: str) -> str:
    """Return a help without what docstrings mark.

    Example:
        >>> _without_markup("``stop`` it, :class:`lit_edit.editors.D4S` does")
        'stop it, lit_edit.editors.D4S does'
    """
    return re.sub(r":\w+:`~?([^`]*)`", r"\1", text).replace("``", "")
