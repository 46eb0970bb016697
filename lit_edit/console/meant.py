"""What was meant by a mistyped class, setting or value that the parser of ``lit-edit fit`` refuses."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from lit_edit.console.catalogue import known_editors
from lit_edit.console.configs import shipped_configs
from lit_edit.errors import did_you_mean

_PACKAGES = {
    "callbacks": ("lit_edit.callbacks", "lightning.pytorch.callbacks"),
    "logger": ("lit_edit.loggers", "lightning.pytorch.loggers"),
    "transforms": ("lit_edit.editors.transforms",),
}
"""By the last part of a setting's name: where its classes are."""


def with_meant(text: str, options: Iterable[str]) -> str:
    """Return what :func:`~lit_edit.console.configs.explain` says, with the nearest right name; ``options`` are all.

    Example:
        >>> with_meant("data.on_error: expected one of 'raise', 'skip'; got skp", [])
        "data.on_error: expected one of 'raise', 'skip'; got skp; did you mean skip?"
        >>> with_meant("Subcommand 'fit' does not accept option 'data.limt'", ["--data.limit"])
        'there is no setting data.limt; did you mean data.limit?'
    """
    if found := re.search(r"Subcommand '\w+' does not accept option '([^']+)'", text):
        names = [option.removeprefix("--") for option in options]
        return f"there is no setting {found[1]}{did_you_mean(found[1], names)}"
    if found := re.match(r"([\w.]+): .*Expected a dot import path string: ([\w.]+);", text):
        return f"{found[1]}: there is no {found[2]}{did_you_mean(found[2], _classes(found[1]))}"
    if found := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", text):
        return _but(text, found[0], f"there is no {found[2]} in it{did_you_mean(found[2], _public(found[1]))}")
    if found := re.search(r"([\w.]+): Option '([\w.]+)' is not accepted", text):
        return _but(text, found[0], f"{found[1]} has no setting {found[2]}{_setting(found[1], found[2])}")
    if found := re.search(r"expected one of ('.*?'(?:, '.*?')*).*; got (\S+)$", text):
        return text + did_you_mean(found[2], re.findall(r"'(.*?)'", found[1]))
    return text


def _but(text: str, said: str, better: str) -> str:
    """Say something better, and not what was given behind it: it may be long."""
    return f"{text.partition(said)[0]}{better}"


def _classes(setting: str) -> list[str]:
    """Return the names of what a setting can be."""
    last = setting.rpartition(".")[2]
    if last == "editor":
        return [editor.name for editor in known_editors()]
    names = [name for package in _PACKAGES.get(last, ()) for name in _public(package)]
    return [*names, *(c.removeprefix("logger/") for c in shipped_configs() if last == "logger" and c[:7] == "logger/")]


def _public(module: str) -> list[str]:
    known = import_module(module)
    return list(getattr(known, "__all__", None) or dir(known))


def _setting(path: str, name: str) -> str:
    """Say which argument of a class, or of one of its bases, was meant."""
    module, _, kind = path.rpartition(".")
    found = getattr(sys.modules.get(module), kind, None)
    parents = found.__mro__ if inspect.isclass(found) else ()
    made: list[Any] = [
        vars(parent)["__init__"] for parent in parents if "__init__" in vars(parent) and parent is not object
    ]
    settings = dict.fromkeys(known for init in made for known in inspect.signature(init).parameters)
    shown = [known for known in settings if known not in ("self", "args", "kwargs")]
    return did_you_mean(name, shown) or f"; it has {', '.join(shown) or 'none'}"
