"""Whether work that goes on does so with the settings that it was begun with: decided here, for every command."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lit_edit.errors import ArgumentError, shorten

Decides = Callable[[str], bool]
"""Tells by a setting's name whether it changes what comes of the work."""


def changes(before: Any, after: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, by name.

    Example:
        >>> changes({"data": {"limit": 1, "offset": 0}}, {"data": {"limit": 2, "offset": 0}})
        {'data.limit': (1, 2)}
    """
    if before == after:
        return {}
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return {name: (before, after)}
    found: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys([*before, *after]):
        found |= changes(before.get(key), after.get(key), f"{name}.{key}" if name else str(key))
    return found


def tell_changes(before: Any, after: Any, decides: Decides = lambda name: True) -> str:
    """Return in words which settings differ, of those that decide; nothing where none does.

    Example:
        >>> tell_changes({"seed": 0, "name": "a"}, {"seed": 1, "name": "b"}, lambda name: name != "name")
        'seed 0, now 1'
    """
    return "; ".join(
        f"{name.removeprefix('model.editor.init_args.')} {shorten(repr(old), 60)}, now {shorten(repr(new), 60)}"
        for name, (old, new) in changes(before, after).items()
        if decides(name)
    )


def refuse_changes(what: str, before: Any, after: Any, cure: str, decides: Decides = lambda name: True) -> None:
    """Raise :class:`ArgumentError` if settings that decide about numbers are not those of before, and name them.

    Args:
        what: Was made, or begun, for the message: ``"the run was made"``.
        before: Settings by name, however deep, as JSON has them.
        after: The same, as they are asked for now.
        cure: What to do, for the message.
        decides: Tells by a setting's name whether it changes what comes of the work.

    Example:
        >>> refuse_changes("the run was made", {"seed": 0}, {"seed": 1}, "take that seed")
        Traceback (most recent call last):
        lit_edit.errors.ArgumentError: the run was made with other settings (seed 0, now 1): take that seed
    """
    if told := tell_changes(before, after, decides):
        raise ArgumentError(f"{what} with other settings ({told}): {cure}")
