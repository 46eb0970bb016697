"""The arguments of ``lit-edit fit`` as one writes them: short forms, configs by name, one seed for all."""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

from lit_edit.console.arguments import LAYERS, SHORT, CommandParser, no_such_option, read_layers
from lit_edit.console.catalogue import setting_names
from lit_edit.console.configs import check_config, config_root, find_config, method_config, shipped_configs
from lit_edit.errors import ArgumentError, shorten
from lit_edit.files.paths import expand

_SAME = MappingProxyType({"--seed": "seed_everything", "--name": "run_name", "--limit": "data.limit"})


_CLASS_OR_CONFIG = re.compile(r"\.ya?ml$|^\{|^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*\.[A-Z]\w*$")


OPTIONS = (
    *SHORT, *_SAME, "--config", "--trainer", "--run_name", "--runs_dir", "--resume", "--continue", "--overwrite",
    "--quiet", "--json", "--seed_everything", "--ckpt_path", "--weights_only", "--train", "--print_config", "--help",
)  # fmt: skip
"""What the arguments of ``fit`` may begin with, up to the first point."""


def known_options() -> list[str]:
    """Return the options of ``fit`` that are told to those who mistype one, without what takes seconds to import."""
    return [*OPTIONS, *(f"--{name}" for name in (*setting_names(), *_OF_TRAINER))]


_OF_TRAINER = tuple(
    f"trainer.{name}"
    for name in ("accelerator", "strategy", "devices", "num_nodes", "precision", "logger", "callbacks", "max_steps",
                 "max_time", "limit_train_batches", "log_every_n_steps", "enable_progress_bar", "deterministic")
)  # fmt: skip


def check_names(command: str, args: Sequence[str]) -> None:
    """Refuse an option that there cannot be, before anything heavy is imported; the parser knows the others.

    Example:
        >>> check_names("fit", ["--data.limit", "3", "--run-name=x"])
    """
    for word in args:
        name = re.split(r"[.=]", word)[0].replace("-", "_").replace("__", "--", 1)
        if word.startswith("--") and len(name) > 2 and not any(option.startswith(name) for option in OPTIONS):
            told = no_such_option(word.partition("=")[0], known_options())
            raise ArgumentError(f"{told} (lit-edit {command} --help lists all settings)")


def check_data(args: Sequence[str]) -> None:
    """Refuse a file of edits (``--data FILE``) that is not there, before anything heavy is imported."""
    words = full_settings(args)
    paths = [word.partition("=")[2] for word in words if word.startswith("--data.path=")]
    if "--data.source=file" in words and paths and not expand(paths[-1]).exists():
        raise ArgumentError(f"{paths[-1]}: no such file")


def full_settings(args: Sequence[str], elsewhere: bool = False) -> list[str]:
    """Return arguments of ``lit-edit fit`` with all settings by their full names, and ``_`` for ``-`` in names.

    What short forms stand for comes behind the configs, wherever they stood: it wins over these. A config or a class is
    no file of edits and no model: ``--data x.yaml`` and ``--model package.Class`` stay Lightning's. If they are used
    ``elsewhere``, in other processes, or again, ``--data`` must be there, and is named in full.

    Example:
        >>> full_settings(["--limit", "3", "--config", "quickstart", "--run-name", "x"])
        ['--config', 'quickstart', '--data.limit=3', '--run_name', 'x']
    """
    kept: list[str] = []
    configs: list[str] = []
    short: list[str] = []
    rest = list(args)
    sourced = any(re.match(r"--data\.source(=|$)", word) for word in rest)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        name = f"--{name[2:].replace('-', '_')}" if name.startswith("--") else name
        layers = name.startswith("--") and (name == "--layers" or name.endswith((".layers", ".layer")))
        if not layers and name not in SHORT and name not in _SAME:
            kept.append(f"{name}{equals}{value}")
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ArgumentError(f"{name}: expected a value")
            value = rest.pop(0)
        if layers:
            while rest and re.fullmatch(r"-?\d+[\],]*", rest[0]):
                value += f" {rest.pop(0)}"
            (short if name == "--layers" else kept).append(_layers(name, value))
        elif name in ("--data", "--model") and _CLASS_OR_CONFIG.search(value) and not Path(value).is_dir():
            kept.append(f"{name}={value}")
        elif name == "--method":
            configs += ["--config", method_config(value)]
        else:
            if elsewhere and name == "--data" and value != "builtin":
                if not Path(value).is_file():
                    raise ArgumentError(f"--data {shorten(value)}: no such file")
                value = str(Path(value).resolve())
            short += _of(name, value, sourced)
    last = max((place for place, word in enumerate(kept) if re.match(r"(--config|-c)(=|$)", word)), default=-1)
    behind = last + 1 + (last >= 0 and "=" not in kept[last])
    return [*kept[:behind], *configs, *short, *kept[behind:]]


def _layers(name: str, value: str) -> str:
    full = f"--{LAYERS}" if name == "--layers" else name
    try:
        numbers = read_layers([value])
    except ValueError as error:
        if name == "--layers":
            raise ArgumentError(f"--layers: {error}") from None
        return f"{full}={value}"  # an editor's own way to say it, or null
    return f"{full}={numbers[0] if name.endswith('.layer') and len(numbers) == 1 else numbers}"


def _of(name: str, value: str, sourced: bool) -> list[str]:
    if name == "--model":
        return [f"--model.language_model.name={value}"]
    if name == "--out":
        folder = Path(value)
        return [f"--runs_dir={folder.parent}", f"--run_name={folder.name}"]
    if name == "--data" and value == "builtin":
        return ["--data.source=builtin", "--data.path=null"]
    if name == "--data":
        return [*([] if sourced else ["--data.source=file"]), f"--data.path={value}"]
    return [f"--{_SAME[name]}={value}"]


def expand_arguments(args: list[str]) -> list[str]:
    """Write arguments of ``lit-edit fit`` as its parser takes them.

    Short forms become full settings, names of configs paths, and ``--trainer.logger NAME`` the logger config of that
    name.

    Example:
        >>> expand_arguments(["--trainer.logger", "csv", "--x", "1"])[1].endswith("logger/csv.yaml")
        True
    """
    expanded: list[str] = []
    rest = full_settings(args)
    while rest:
        word = rest.pop(0)
        option, equals, value = word.partition("=")
        if option in ("--config", "-c", "--trainer.logger") and not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        elif not equals:
            expanded.append(word)
            continue
        if option in ("--config", "-c"):
            expanded += ["--config", find_config(value)]
            check_config(expanded[-1])
        elif option == "--trainer.logger" and f"logger/{value}" in shipped_configs():
            expanded += ["--config", find_config(f"logger/{value}")]
        else:
            expanded += [option, value] if not equals else [word]
    return _seeded(expanded)


def with_config(args: list[str]) -> list[str]:
    """Return arguments of ``fit`` with the config that is meant where none is named: ``quickstart``."""
    named = any(word in ("-c", "--config") or word.startswith(("--config=", "-c=")) for word in args)
    return args if named else ["--config", "quickstart", *args]


def _seeded(args: list[str]) -> list[str]:
    """Let ``--seed_everything N`` reach what refers to it in config files: a file is resolved on its own, before."""
    seeds = [value for option, value in zip(args, [*args[1:], ""], strict=True) if option == "--seed_everything"]
    seeds += [word.partition("=")[2] for word in args if word.startswith("--seed_everything=")]
    if not seeds or not re.fullmatch(r"\d+", seeds[-1]):
        return args
    folder = Path(tempfile.mkdtemp(prefix="lit-edit-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for index in range(1, len(args)):
        if args[index - 1] != "--config":
            continue
        text = Path(args[index]).read_text(encoding="utf-8")
        if "${seed_everything}" in text:
            copy = folder / f"{index}-{Path(args[index]).name}"
            copy.write_text(
                re.sub(r"(?m)^seed_everything:.*$", f"seed_everything: {seeds[-1]}", text), encoding="utf-8"
            )
            args[index] = str(copy)
    return args


def trains_network(args: list[str]) -> bool:
    """Tell whether arguments of ``fit`` name a config that trains a network: ``train/NAME``, or one with ``train:``."""
    words = expand_arguments(args)
    paths = [Path(path) for option, path in pairwise(words) if option == "--config"]
    return any(
        path.parent == config_root() / "train" or re.search(r"(?m)^train\s*:", path.read_text(encoding="utf-8"))
        for path in paths
    )


def read_settings(parser: CommandParser, words: Sequence[str]) -> dict[str, str]:
    """Read settings that hold for several fits, by their full names: ``--data.limit 3``, ``--limit 3``."""
    found, rest = {}, full_settings(words, elsewhere=True)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if not re.fullmatch(r"--(\w+(\.\w+)+|seed_everything)", name):
            known = [*SHORT, *parser._shown_options(), *known_options()]
            parser.error(f"{name} is of a single fit" if name in known else no_such_option(name, known))
        if not equals:
            if not rest or rest[0].startswith("--"):
                parser.error(f"argument {word}: expected a value")
            value = rest.pop(0)
        found[name[2:]] = value
    return found
