"""If-then knowledge about everyday events in the form of ATOMIC (arXiv 1811.00146): what a head event implies."""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_edit.data.files import read_text
from lit_edit.data.request import DataError, find_fault
from lit_edit.data.sources import builtin_text, hub_rows
from lit_edit.errors import did_you_mean, shorten
from lit_edit.files.paths import expand

log = logging.getLogger(__name__)

RELATIONS = ("xIntent", "xNeed", "xAttr", "xEffect", "xReact", "xWant", "oEffect", "oReact", "oWant")
"""ATOMIC's nine: why PersonX does it, what they needed, how they are seen, what they and others do, feel, want."""
OTHERS = (
    "AtLocation", "CapableOf", "Causes", "Desires", "HasProperty", "HasSubEvent", "HinderedBy", "MadeUpOf",
    "NotDesires", "ObjectUse", "isAfter", "isBefore", "isFilledBy", "xReason",
)  # fmt: skip
"""What ATOMIC 2020 (arXiv 2010.05953) has beside them; read over."""

COLUMNS = ("head", "relation", "tail", "group")


@dataclass(frozen=True)
class Event:
    """One tuple: ``PersonX bakes bread``, one of :data:`RELATIONS`, and what it implies: ``to knead the dough``.

    The group says what the tail is about, if that is known: tails of another do not answer for this head by accident.
    """

    head: str
    relation: str
    tail: str
    group: str = ""


def read_events(source: str | None = None, split: str = "train") -> list[Event]:
    """Read events, in order and each once: those that ship, of a file, or of a hub data set (``owner/name``).

    A file has tabs between head, relation and tail (and group, if there is one); a data set has these columns. Tuples
    that say nothing are left out, and counted in the log: tails ``none``, heads with a blank (``___``), and relations
    of ATOMIC 2020 that are none of :data:`RELATIONS`. A :class:`DataError` names the line that is no tuple.
    """
    if source is None:
        name, rows = "events.txt", _lines("events.txt", builtin_text("events.txt"))
    elif _is_hub_id(source):
        name, rows = source, _hub(source, split)
    else:
        name, rows = source, _lines(source, read_text(expand(source)))
    left_out: Counter[str] = Counter()
    events: dict[Event, None] = {}
    for place, cells in rows:
        event = _event(place, cells)
        if reason := _says_nothing(event):
            left_out[reason] += 1
        else:
            events.setdefault(event)
    if not events:
        raise DataError(f"{name}: no events{_tell(left_out)}")
    if left_out:
        log.warning("%s%s", name, _tell(left_out).replace(";", ":", 1))
    return list(events)


def _is_hub_id(source: str) -> bool:
    """Tell a hub id from a file: ``owner/name``, and no such file or folder, nor the name of one.

    Example:
        >>> [_is_hub_id(name) for name in ("owner/atomic", "data/train.tsv", "events", "/a/b", "./a", "a/b/c")]
        [True, False, False, False, False, False]
    """
    return (
        re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) is not None
        and not source.lower().endswith((".tsv", ".txt", ".csv", ".json", ".jsonl"))
        and not Path(source).exists()
    )


def _lines(name: str, text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield place and cells of each line but comments, empty ones, and a header."""
    for number, line in enumerate(text.split("\n"), 1):
        line = line.rstrip("\r")
        cells = [cell.strip() for cell in line.split("\t")]
        is_header = number == 1 and tuple(cell.lower() for cell in cells) in (COLUMNS[:3], COLUMNS)
        if line.strip() and not line.startswith("#") and not is_header:
            yield f"{name}:{number}", cells


def _hub(name: str, split: str) -> Iterator[tuple[str, list[str]]]:
    for place, row in hub_rows(name, split):
        if not isinstance(row, Mapping):
            raise DataError(f"{place}: expected columns by name, got {type(row).__name__}")
        missing = [column for column in COLUMNS[:3] if not isinstance(row.get(column), str)]
        if missing:
            has = ", ".join(map(str, row))
            raise DataError(f"{place}: expected a text in the column {missing[0]}; the data set has the columns {has}")
        group: Any = row.get("group")
        yield place, [*(row[column].strip() for column in COLUMNS[:3]), group if isinstance(group, str) else ""]


def _event(place: str, cells: list[str]) -> Event:
    if len(cells) not in (3, 4):
        raise DataError(
            f"{place}: expected head, relation and tail (and, if you like, a group) with tabs between them, got "
            f"{len(cells)} columns: {shorten(' | '.join(cells))!r}"
        )
    for column, cell in zip(COLUMNS[:3], cells, strict=False):
        if not cell:
            raise DataError(f"{place}: the {column} is empty")
        if fault := find_fault(cell) or ("{}, which stands for the subject" if "{}" in cell else None):
            raise DataError(f"{place}: the {column} holds {fault}")
    head, relation, tail = (" ".join(cell.split()) for cell in cells[:3])
    if relation not in (*RELATIONS, *OTHERS):
        meant = did_you_mean(relation, RELATIONS) or f"; expected one of {', '.join(RELATIONS)}"
        raise DataError(f"{place}: unknown relation {shorten(relation)!r}{meant}")
    return Event(head.rstrip(" ."), relation, tail.rstrip(" ."), cells[3] if len(cells) > 3 else "")


def _says_nothing(event: Event) -> str | None:
    if event.relation in OTHERS:
        return "of other relations"
    if "__" in event.head or not event.head:
        return "with a blank in the head"
    return "without a tail" if not event.tail or event.tail.casefold() == "none" else None


def _tell(left_out: Counter[str]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    return f"; left out were tuples that say nothing: {reasons}" if reasons else ""


def tails_by_relation(events: Iterable[Event]) -> dict[str, list[Event]]:
    """Return the events of each relation, in order."""
    found: defaultdict[str, list[Event]] = defaultdict(list)
    for event in events:
        found[event.relation].append(event)
    return found
