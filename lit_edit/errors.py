"""Errors that are the user's to mend: the command line shows their message alone and ends with status 2."""

from __future__ import annotations

import math
from collections.abc import Iterable


class UserError(ValueError):
    """Arguments, data or a model that cannot be used; the message says what to do."""


class RunStoppedError(RuntimeError):
    """A run that could not go on; the message says why and how it goes on. The command line ends with status 1."""


class ArgumentError(UserError):
    """A setting that does not fit the model or another setting."""


class NotHereError(ArgumentError):
    """An editor or logger that cannot be had here: a package or a trained network is missing; says how to get it."""


def nearest(name: str, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> list[str]:
    """Return the known names that come near a mistyped one, the nearest first, in whatever case, with ``_`` or ``-``.

    Example:
        >>> nearest("Data.Limt", ["data.limit", "data.path"]), nearest("nope", ["compare"])
        (['data.limit'], [])
        >>> nearest("data.nonsense", ["data.offset"])  # what they share says nothing
        []
    """
    from difflib import get_close_matches

    by_plain = {word.casefold().replace("_", "-"): word for word in known}
    wanted = name.casefold().replace("_", "-")
    home, _, own = wanted.rpartition(".")

    def is_near(word: str) -> bool:
        other, _, last = word.rpartition(".")
        return not home or other != home or bool(get_close_matches(own, [last], 1, cutoff))

    return [by_plain[word] for word in get_close_matches(wanted, [*filter(is_near, by_plain)], count, cutoff)]


def did_you_mean(name: str, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> str:
    """Return ``; did you mean X?`` for the end of a message about a mistyped name; nothing where none comes near.

    Example:
        >>> did_you_mean("fti", ["fit", "plan"]), did_you_mean("xyzzy", ["fit", "plan"])
        ('; did you mean fit?', '')
    """
    near = nearest(name, known, count, cutoff)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def counted(number: int, thing: str, things: str | None = None) -> str:
    """Return a number of things; singular and plural agree.

    Example:
        >>> counted(1, "edit"), counted(2, "edit"), counted(0, "fact"), counted(2, "entry", "entries")
        ('1 edit', '2 edits', '0 facts', '2 entries')
    """
    return f"{number} {thing}" if number == 1 else f"{number} {things or f'{thing}s'}"


def shorten(text: str, most: int = 160) -> str:
    """Return a text for an error message, cut where it is long.

    Example:
        >>> shorten("a text of many words", 7)
        'a text…'
    """
    return text if len(text) <= most else f"{text[: most - 1]}…"


def check_positive(**values: float) -> None:
    """Raise :class:`ValueError` for the first of some arguments that is not positive and finite.

    Example:
        >>> check_positive(lr=0.1, eta=0.0)
        Traceback (most recent call last):
        ValueError: eta must be positive and finite, got 0.0
    """
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")


def check_not_negative(**values: float) -> None:
    """Raise :class:`ValueError` for the first of some arguments that is negative or not finite."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must not be negative or infinite, got {value}")


def check_least(low: float, **values: float | None) -> None:
    """Raise :class:`ValueError` for the first of some arguments that is below ``low``; ``None`` is left to defaults."""
    for name, value in values.items():
        if value is not None and value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}")


def check_one_of(choices: Iterable[object], **values: object) -> None:
    """Raise :class:`ValueError` for the first of some arguments that is none of two or more choices."""
    *others, last = map(repr, choices)
    for name, value in values.items():
        if repr(value) not in (*others, last):
            raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value!r}")


def check_known(names: Iterable[str], **values: object) -> None:
    """Raise :class:`ValueError` for the first of some arguments that is none of the names of a kind.

    Example:
        >>> check_known(("rome", "memit"), method="rime")
        Traceback (most recent call last):
        ValueError: method must be one of rome, memit, got 'rime'
    """
    names = list(names)
    for name, value in values.items():
        if value not in names:
            raise ValueError(f"{name} must be one of {', '.join(names)}, got {value!r}")


def check_within(interval: str, **values: float) -> None:
    """Raise :class:`ValueError` for the first of some arguments that is outside an interval such as ``(0, 1]``.

    Example:
        >>> check_within("(0, 1]", keep=1.0, share=0.0)
        Traceback (most recent call last):
        ValueError: share must be in (0, 1], got 0.0
    """
    low, high = map(float, interval[1:-1].split(","))
    for name, value in values.items():
        above = low <= value if interval[0] == "[" else low < value
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):
            raise ValueError(f"{name} must be in {interval}, got {value}")
