"""Finding configs by name: a path, or one that ships with the package."""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from importlib.resources import as_file, files
from pathlib import Path

from lit_edit.errors import ArgumentError


def config_root() -> Path:
    """Return the folder of the configs that ship."""
    with as_file(files("lit_edit.configs")) as root:
        return Path(root)


def shipped_configs() -> list[str]:
    """Return the names of all configs that ship, for example ``quickstart`` and ``method/d4s``."""
    root = config_root()
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))


def find_config(name: str) -> str:
    """Return the path of a config given as path or name.

    Raises:
        ArgumentError: If there is no such file and none of that name ships.
    """
    if Path(name).is_file():
        return name
    shipped = config_root() / f"{name.removesuffix('.yaml')}.yaml"
    if shipped.is_file() and config_root() in shipped.resolve().parents:
        return str(shipped)
    raise ArgumentError(
        f"--config {name}: no such file, and no config of that name ships. Shipped: {', '.join(shipped_configs())}"
    )


def expand_arguments(args: list[str]) -> list[str]:
    """Replace config names by paths, and ``--trainer.logger NAME`` by the logger config of that name.

    Example:
        >>> expand_arguments(["--trainer.logger", "csv", "--x", "1"])[1].endswith("logger/csv.yaml")
        True
    """
    expanded: list[str] = []
    rest = list(args)
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
        elif option == "--trainer.logger" and f"logger/{value}" in shipped_configs():
            expanded += ["--config", find_config(f"logger/{value}")]
        else:
            expanded += [option, value] if not equals else [word]
    return _seeded(expanded)


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
