"""What the commands' parsers have in common: one name for one thing, and every way to write it.

A name is written with ``-`` or ``_``, as one likes; the spellings of earlier versions are taken and not shown. Whoever
mistypes one is told the nearest that there is.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from lit_edit.console.configs import method_config, shipped_configs
from lit_edit.errors import ArgumentError, did_you_mean, nearest
from lit_edit.runs.files import journal_path

LAYERS = "model.editor.init_args.layers"
SHORT = MappingProxyType(
    {
        "--data": "the edits: a file (JSON, JSONL, CSV; its form is seen from its fields), or builtin",
        "--limit": "make at most so many edits: data.limit",
        "--model": "packaged model, folder or hub id: model.language_model.name",
        "--method": "the editor, with its settings: rome, or a config as those of method/",
        "--layers": f"which to edit, 6 7: {LAYERS}",
        "--out": "the run's folder: runs_dir and run_name in one",
        "--seed": "seed_everything",
    }
)
"""Short forms of settings of ``lit-edit fit``, by name: what the help says."""


class CommandParser(argparse.ArgumentParser):
    """Parser of ``lit-edit COMMAND``; its help shows defaults.

    With ``settings`` any setting of ``lit-edit fit`` may follow; :meth:`parse_known_args` leaves those.
    """

    def __init__(self, command: str, description: str, settings: bool = False, **more: Any) -> None:
        self._aliases: dict[str, str] = {}
        self._takes_settings, self._answers = settings, False
        self._run: argparse.Action | None = None
        self._unknown: list[str] = []  # options that may be settings of fit, or mistyped
        super().__init__(
            prog=f"lit-edit {command}", description=description, formatter_class=_Help, allow_abbrev=False, **more
        )

    def add_argument(
        self, *names: str, aliases: Iterable[str] = (), complete: Callable[[], Iterable[str]] | None = None, **more: Any
    ) -> argparse.Action:
        """Add an argument.

        ``aliases`` are other spellings, which the help does not show. ``complete`` returns values for the shell's
        completion, by default file names.
        """
        action = super().add_argument(*names, **more)
        self._aliases |= dict.fromkeys(aliases, names[0])
        if complete is not None:
            action.completer = lambda **_: complete()  # type: ignore[attr-defined] # argcomplete's name
        return action

    # ---- one name for one thing

    def add_run(self, **more: Any) -> None:
        """Add ``--run``: the folder of a run; without it the newest below ``runs/``."""
        more = {"type": Path, "help": "the run: runs/x, or its name below runs/; by default the newest there", **more}
        self._run = self.add_argument(
            "--run", default=None, complete=run_folders, action=_Checked, check=check_run, **more
        )

    def add_data(self, text: str, *aliases: str, **more: Any) -> None:
        """Add ``--data``: the edits, facts or events that a command reads."""
        self.add_argument("--data", aliases=("--data.path", *aliases), **{"metavar": "FILE", "help": text, **more})

    def add_limit(self, text: str, *aliases: str, **more: Any) -> None:
        """Add ``--limit``: how many of them."""
        more = {"type": positive, "default": None, "metavar": "N", "help": text, **more}
        self.add_argument("--limit", aliases=("--data.limit", *aliases), **more)

    def add_out(self, text: str, **more: Any) -> None:
        """Add ``--out``: the file or folder that is written."""
        self.add_argument("--out", aliases=("--to",), **{"type": Path, "default": None, "help": text, **more})

    def add_task_files(self, text: str, *aliases: str) -> None:
        """Add ``--task_files``: a folder with the items of each task."""
        more: dict[str, Any] = {"type": Path, "default": None, "metavar": "FOLDER", "help": f"a file per task; {text}"}
        self.add_argument("--task_files", aliases=aliases, **more)

    def add_runs(self, where: str, text: str | None = None, default: str | None = None) -> None:
        """Add ``--runs_dir``, where run folders are made, and, if it may be chosen, ``--run_name`` (as ``name``)."""
        self.add_argument("--runs_dir", default="runs", help=f"everything goes to RUNS_DIR/{where}")
        if text is not None:
            self.add_argument(
                "--run_name", aliases=("--name",), dest="name", metavar="NAME", default=default, help=text
            )

    def add_dry_run(self, runs: str, written: str) -> Any:
        """Add ``--dry-run`` and ``--gather``; return their group, for others that exclude them."""
        group = self.add_mutually_exclusive_group()
        group.add_argument("--dry-run", action="store_true", help=f"list {runs} and their commands; run nothing")
        group.add_argument("--gather", action="store_true", help=f"{written} of what is there; run nothing")
        return group

    def add_model(self, default: str | None = "smollm2-135m", **more: Any) -> None:
        """Add ``--model``: a packaged one, a folder or a hub id."""
        more = {"help": "packaged model, folder or hub id", "default": default, "action": _Checked, **more}
        names = "--model", "--model.language_model.name"
        self.add_argument(names[0], aliases=names[1:], complete=packaged_models, check=check_model, **more)

    def add_method(self, default: Any, **more: Any) -> None:
        """Add ``--method``: an editor with its settings."""
        more = {"help": "the editor: rome, or a YAML file like those of configs/method", **more}
        more |= {"default": default, "action": _Checked, "check": method_config}
        self.add_argument("--method", complete=methods, **more)

    def add_layers(self, text: str) -> None:
        """Add ``--layers``: ``6 7``, ``6,7`` or ``[6,7]``."""
        more: dict[str, Any] = {"metavar": "LAYER", "default": None, "help": text}
        self.add_argument("--layers", nargs="+", action=_Layers, aliases=(f"--{LAYERS}",), **more)

    def add_config(self, text: str, **more: Any) -> None:
        """Add ``--config``: a YAML file or the name of one that ships."""
        self.add_argument(
            "--config", complete=shipped_configs, **{"help": f"{text}, or the name of one that ships", **more}
        )

    def add_seed(self, text: str) -> None:
        """Add ``--seed``."""
        self.add_argument("--seed", type=int, default=0, aliases=("--seed_everything",), help=text)

    # ---- parsing

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, with every spelling of a name."""
        if "_ARGCOMPLETE" in os.environ and not self._answers:
            self._answers = True  # argcomplete parses once more
            self._answer_shell()
        spellings = {_plain(alias): name for alias, name in self._aliases.items()}
        spellings |= {_plain(name): name for name in self._option_string_actions if name.startswith("--")}
        found, rest = super().parse_known_args(self._renamed(list(args or ()), spellings), namespace)
        if self._run is not None and getattr(found, self._run.dest) is None:
            newest = newest_run()
            sys.stderr.write(f"{self.prog}: --run {newest}, the newest\n")
            setattr(found, self._run.dest, [newest] if self._run.nargs == "+" else newest)
        return found, rest

    def _renamed(self, words: list[str], spellings: dict[str, str]) -> list[str]:
        """Return the words with all options by their shown names.

        A beginning that is one option's alone stands for it; but not where settings of ``fit`` may follow.
        """
        found: list[str] = []
        for index, word in enumerate(words):
            name, equals, value = word.partition("=")
            if word == "--":
                return found + words[index:]
            if not word.startswith("--") or " " in name:
                found.append(word)
                continue
            plain = _plain(name)
            begun = {shown for spelling, shown in spellings.items() if spelling.startswith(plain)}
            if plain in spellings:
                name = spellings[plain]
            elif not self._takes_settings:
                if len(begun) != 1:
                    self.error(no_such_option(name, self._shown_options()))
                name = begun.pop()
            elif "." not in name and name.replace("-", "_").replace("__", "--", 1) not in SHORT:
                self._unknown.append(name)
            found.append(f"{name}{equals}{value}")
        return found

    def _shown_options(self) -> list[str]:
        return [name for name in self._option_string_actions if name.startswith("--")]

    def error(self, message: str) -> NoReturn:
        """Say in one line what is wrong, and end with status 2; what is missing may be what was mistyped."""
        if "arguments are required" in message and self._unknown:
            message = no_such_option(self._unknown[0], [*self._shown_options(), *SHORT])
        self.exit(2, f"{self.prog}: error: {message}\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            meant = did_you_mean(str(value), map(str, action.choices or ()))
            raise argparse.ArgumentError(action, f"{error.message}{meant}") from None

    def _answer_shell(self) -> None:
        """Tell the shell what can stand where the cursor is, and end (``lit-edit completion``)."""
        import argcomplete

        if self._takes_settings:
            from lit_edit.console.catalogue import setting_names

            for name in (*SHORT, *(f"--{name}" for name in setting_names())):
                if name not in self._option_string_actions:
                    self.add_argument(name)
        argcomplete.autocomplete(self, always_complete_options=False)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that there are; a flag and what has none say what happens without them."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_none = action.default is None or action.default == [] or action.nargs == 0
        return action.help if has_none else super()._get_help_string(action)


def make_parser(command: str, description: str, settings: bool = False, **more: Any) -> CommandParser:
    """Return the parser of ``lit-edit COMMAND``; its help shows defaults."""
    return CommandParser(command, description, settings, **more)


def no_such_option(name: str, known: Iterable[str]) -> str:
    """Return what to say of an option that there is not.

    Example:
        >>> no_such_option("--rnu", ["--run", "--tokens"])
        'there is no option --rnu; did you mean --run?'
        >>> no_such_option("--on_conflit", ["--run", "--model.on_conflict"])
        'there is no option --on_conflit; did you mean --model.on_conflict?'
    """
    known = list(known)
    by_end = {f"--{option.rpartition('.')[2]}": option for option in reversed(known) if "." in option}
    meant = by_end | {option: option for option in known}
    near = [meant[word] for word in nearest(name, meant)]
    return f"there is no option {name}" + (f"; did you mean {near[0]}?" if near else "")


def _plain(name: str) -> str:
    return name.replace("_", "-")


class _Checked(argparse.Action):
    """Keeps what ``check`` returns; what that refuses is said as commands say it, before anything heavy is imported."""

    def __init__(self, *names: Any, check: Callable[[Any], Any], **more: Any) -> None:
        super().__init__(*names, **more)
        self.check = check

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, [*map(self.check, values)] if isinstance(values, list) else self.check(values))


class _Layers(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            found = read_layers(values)
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        setattr(namespace, self.dest, found)


def read_layers(words: Sequence[str]) -> list[int]:
    """Read numbers of layers; :class:`ValueError` if they are none.

    Example:
        >>> read_layers(["6", "7"]), read_layers(["6,7"]), read_layers(["[6,", "7]"])
        ([6, 7], [6, 7], [6, 7])
    """
    text = " ".join(words).strip()
    if not re.fullmatch(r"(\[)?\s*-?\d+(\s*[\s,]\s*-?\d+)*\s*(?(1)\])", text):
        raise ValueError(f"expected numbers of layers (6 7, 6,7 or [6,7]), got {text!r}")
    return [int(number) for number in re.findall(r"-?\d+", text)]


def check_run(folder: Path) -> Path:
    """Return a run's folder if it is there, or below ``runs/``."""
    from lit_edit.runs.reading import find_folder

    return find_folder(folder)


def newest_run() -> Path:
    """Return the run that was begun last of those below ``runs/``; :class:`ArgumentError` if there is none."""
    found = [Path(folder) for folder in run_folders() if journal_path(Path(folder)).is_file()]
    if not found:
        raise ArgumentError("name a run, --run FOLDER: there is none below runs/ in this folder")
    return found[0]


def check_model(name: str) -> str:
    """Return the name of a model if it can be one."""
    from lit_edit.models.packaged import PACKAGED, find_source

    if name not in PACKAGED:
        find_source(name)
    return name


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


# ---- what the shell completes -------------------------------------------------------------------------------------


def run_folders() -> list[str]:
    """Return the runs below ``runs/``, the one that was begun last first."""
    found = Path("runs").glob("**/config.yaml") if Path("runs").is_dir() else ()
    return [str(path.parent) for path in sorted(found, key=lambda path: -path.stat().st_mtime_ns)]


def methods() -> list[str]:
    """Return the methods that ship, without the folder of their configs."""
    return [name.removeprefix("method/") for name in shipped_configs() if name.startswith("method/")]


def packaged_models() -> list[str]:
    """Return the names of the models that are fetched by name."""
    from lit_edit.models.packaged import PACKAGED

    return list(PACKAGED)
