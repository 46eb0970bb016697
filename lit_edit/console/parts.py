"""Commands that have commands of their own: ``lit-edit build mqd``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module

from lit_edit.errors import ArgumentError, did_you_mean, shorten


def choose_part(
    command: str, about: str, what: tuple[str, str], parts: Mapping[str, tuple[str, str]], args: list[str]
) -> Callable[[list[str]], int | None] | None:
    """Return the function that the first argument names, or print the help and return ``None``.

    ``what`` parts are called, one of them and several; they are given by name: ``module:function``, and what it does.
    """
    if args and args[0] in parts:
        module, _, function = parts[args[0]][0].partition(":")
        found: Callable[[list[str]], int | None] = getattr(import_module(module), function)
        return found
    if args and args[0] not in ("-h", "--help", "help"):
        meant = did_you_mean(args[0], parts) or ";"
        raise ArgumentError(
            f"lit-edit {command}: there is no {what[0]} {shorten(repr(args[0]))}{meant} There are: {', '.join(parts)}"
        )
    if not args:
        raise ArgumentError(f"lit-edit {command}: name a {what[0]}: {', '.join(parts)} (lit-edit {command} --help)")
    width = max(map(len, parts))
    lines = "".join(f"  {name.ljust(width)}  {text}\n" for name, (_, text) in parts.items())
    sys.stdout.write(
        f"usage: lit-edit {command} NAME [options]\n\n{about}\n\n{what[1]}:\n{lines}\n"
        f"lit-edit {command} NAME --help explains its options.\n"
    )
    return None
