"""Numbers of things in sentences."""

from __future__ import annotations


def counted(number: int, thing: str, things: str | None = None) -> str:
    """Return a number of things; singular and plural agree.

    Example:
        >>> counted(1, "edit"), counted(2, "edit"), counted(0, "fact"), counted(2, "entry", "entries")
        ('1 edit', '2 edits', '0 facts', '2 entries')
    """
    return f"{number} {thing}" if number == 1 else f"{number} {things or f'{thing}s'}"
