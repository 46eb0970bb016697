"""Fields of raw records, as the formats (:mod:`lit_edit.data.formats`) read them.

Each function takes a record and the name of a field, and raises :class:`~lit_edit.data.request.DataError`, which names
the field, where it is of the wrong kind or empty.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from lit_edit.data.request import DataError, Probe
from lit_edit.errors import shorten

Record = Mapping[str, Any]


def text(record: Record, name: str) -> str:
    """Return a text or number that must be there, stripped."""
    value = record.get(name)
    if value is None:
        raise DataError(f"missing field {name}")
    written = _written(value)
    if written is None:
        raise DataError(f"{name} must be text, got {type(value).__name__}")
    if not written.strip():
        raise DataError(f"{name} is empty")
    return written.strip()


def optional(record: Record, name: str) -> str | None:
    """Return a text or number, or ``None`` where it is missing or empty."""
    value = record.get(name)
    return None if value is None or (isinstance(value, str) and not value.strip()) else text(record, name)


def texts(record: Record, name: str) -> tuple[str, ...]:
    """Return the texts of a list, or of a cell in which they are parted by ``|``; empty ones are left out."""
    value = record.get(name)
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        value = value.split("|")
    if not isinstance(value, Iterable) or isinstance(value, Mapping):
        raise DataError(f"{name} must be a list of texts, got {type(value).__name__}")
    found = tuple(value)
    if any(not isinstance(one, str) for one in found):
        raise DataError(f"{name} must be a list of texts")
    return tuple(one.strip() for one in found if one.strip())


def identity(record: Record, number: int, *names: str) -> str:
    """Return the id of a record from the first of some fields that it has, else one that is no number of an edit."""
    value = next((record[name] for name in names if record.get(name) is not None), f"fact-{number}")
    written = _written(value)
    if written is None:
        raise DataError(f"id must be text or a number, got {type(value).__name__}")
    if not written.strip():
        raise DataError("id is empty; leave it out to have the records numbered")
    return written.strip()


def first_alias(record: Record, name: str) -> str | None:
    """Return a text, or the first one that is not empty of a list (of lists) of texts; ``None`` if there is none."""
    aliases = [alias for part in listed(record.get(name)) for alias in listed(part)]
    return next((found for alias in aliases if (found := optional({name: alias}, name)) is not None), None)


def probe(record: Record, prompt: str, answer: str) -> tuple[Probe, ...]:
    """Return the one probe of a record whose prompt and answer stand in two fields, if it has one."""
    asked, said = optional(record, prompt), optional(record, answer)
    if asked is None and said is None:
        return ()
    if asked is None or said is None:
        raise DataError(f"{answer} has no {prompt}" if asked is None else f"{prompt} has no {answer}")
    return (Probe(asked, said),)


def probes_by_kind(record: Record, name: str) -> dict[str, tuple[Probe, ...]]:
    """Return the probes of EasyEdit and KnowEdit: by kind, one or a list of ``{prompt, ground_truth}``.

    An answer is a text, a list of aliases, or a list of lists of them; the first is taken. Probes with no answer are
    left out (EasyEdit skips them), and kinds with no probe. EasyEdit's zsRE has one portability probe of its own form.
    """
    kinds = mapping(record, name)
    if {"New Question", "New Answer"} <= set(kinds):
        return {"one_hop": (Probe(text(kinds, "New Question"), text(kinds, "New Answer")),)}
    found: dict[str, tuple[Probe, ...]] = {}
    for kind, part in kinds.items():
        where = f"{name}.{shorten(shown(kind), 40)}"
        if part is None or isinstance(part, str):
            raise DataError(f"{where} must be a list of {{prompt, ground_truth}}, got {type(part).__name__}")
        probes = []
        for one in listed(part):
            if not isinstance(one, Mapping):
                raise DataError(f"{where} must be a list of {{prompt, ground_truth}}, got {type(one).__name__} in it")
            try:
                answer = first_alias(one, "ground_truth" if "ground_truth" in one else "answer")
                prompt = text(one, "prompt")
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
            if answer is not None:
                probes.append(Probe(prompt, answer))
        if probes:
            found[str(kind)] = tuple(probes)
    return found


def mapping(record: Record, name: str) -> Mapping[Any, Any]:
    """Return an object; an empty one where it is missing."""
    value = record.get(name)
    if value is None or value == "":
        return {}
    if not isinstance(value, Mapping):
        raise DataError(f"{name} must be an object of lists, got {type(value).__name__}")
    return value


def listed(value: object) -> list[Any]:
    """Return a list as it is, and one thing as a list of one."""
    return value if isinstance(value, list) else [value]


def shown(name: object) -> str:
    """Return a field's name for a message: as it is, or quoted where it holds something that does not show."""
    return str(name) if str(name).isprintable() else repr(name)


def _written(value: object) -> str | None:
    """Return a text as it is and a number as text: years and numbers are written without quotes now and then."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        with suppress(ValueError):  # Python refuses to write out integers of thousands of digits
            return str(value)
    return None
