"""What was asked for and is not in the model: broken records, edits that conflict with others, and harmful ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

Why = Literal["broken", "conflict", "refused", "declined"]
"""A record that cannot be read; an edit like another one; one that would have done harm; as ``apply_edit`` said."""


def left_out(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what a journal says was left out, in order, as primitives.

    Each has ``kind`` (``broken`` for a record that could not be read; ``conflict`` with another edit; ``refused``,
    since it would have done harm; ``declined`` by the stream), ``id``, ``file`` and ``line`` (``None`` where the edits
    came from no file), ``prompt``, ``target_new`` and ``reason``.

    Example:
        >>> records = [{"kind": "begin", "left_out": [["facts.csv:3", "missing field subject"]]}]
        >>> [(row["kind"], row["file"], row["line"], row["reason"]) for row in left_out(records)]
        [('broken', 'facts.csv', 3, 'missing field subject')]
    """
    found: list[dict[str, Any]] = []
    for record in records:
        found += [_row("broken", reason, place=place) for place, reason in record.get("left_out", ())]
        if record["kind"] == "refused":
            ids = record["ids"]
            asked = record.get("asked") or [("", "")] * len(ids)
            places = record.get("places") or [""] * len(ids)
            why, reason = record.get("why", "refused"), record["reason"]
            found += [_row(why, reason, *about) for about in zip(ids, asked, places, strict=True)]
    return found


def _row(kind: str, reason: str, name: str = "", asked: Iterable[str] = ("", ""), place: str = "") -> dict[str, Any]:
    prompt, target = asked
    file, line = _parted(place)
    return {
        "kind": kind, "id": name, "file": file, "line": line, "prompt": prompt, "target_new": target, "reason": reason
    }  # fmt: skip


def _parted(place: str) -> tuple[str | None, int | None]:
    """Return file (or data set) and line (or row) of a place such as ``facts.csv:3`` or ``owner/name, row 3``."""
    found = re.fullmatch(r"(.*?)(?::|, (?:row|record) )(\d+)", place)
    return (found[1], int(found[2])) if found else (place or None, None)
