"""Finding configs by name: a path, or one that ships with the package."""

from __future__ import annotations

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
    return expanded
