"""Commands that have commands of their own: ``lit-edit build mqd``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from difflib import get_close_matches

from lit_edit.data.request import shorten
from lit_edit.errors import ArgumentError


def choose_part(
    command: str, about: str, what: str, parts: Mapping[str, tuple[str, str]], args: list[str]
) -> str | None:
    """Return what the first argument names, or print the help and return ``None``.

    Args:
        command: The command above.
        about: What it does.
        what: What its parts are, in the singular.
        parts: By name: what stands for it (``module:function``), and what it does.
        args: The arguments behind the command.

    Raises:
        ArgumentError: If the first argument names none of them.
    """
    if args and args[0] in parts:
        return parts[args[0]][0]
    if args and args[0] not in ("-h", "--help", "help"):
        near = get_close_matches(args[0], parts, 1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise ArgumentError(
            f"lit-edit {command}: there is no {what} {shorten(repr(args[0]))}; {meant}There are: {', '.join(parts)}"
        )
    if not args:
        raise ArgumentError(f"lit-edit {command}: name a {what}: {', '.join(parts)} (lit-edit {command} --help)")
    width = max(map(len, parts))
    lines = "".join(f"  {name.ljust(width)}  {text}\n" for name, (_, text) in parts.items())
    sys.stdout.write(
        f"usage: lit-edit {command} NAME [options]\n\n{about}\n\n{what}s:\n{lines}\n"
        f"lit-edit {command} NAME --help explains its options.\n"
    )
    return None
