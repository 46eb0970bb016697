"""Where a stream's requests come from: the built-in facts, a file, or a hub data set."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal

from lit_edit.data.files import read_file
from lit_edit.data.formats import FORMATS, read_record
from lit_edit.data.request import DataError, EditRequest
from lit_edit.errors import counted
from lit_edit.files.hub import hub_fault, reaching_hub
from lit_edit.files.paths import expand

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    Source = str
else:  # the command line shows these and takes no others
    _SOURCES = ("builtin", "file", "hub", *FORMATS[1:])
    Source = Literal[_SOURCES]
OnError = Literal["raise", "skip"]


def load_requests(
    source: Source = "builtin",
    path: str | None = None,
    limit: int | None = None,
    offset: int = 0,
    on_error: OnError = "raise",
    split: str = "train",
) -> tuple[list[EditRequest], list[tuple[str, str]]]:
    """Read the requests of a stream.

    Args:
        source: ``builtin``; ``file`` (format seen from its fields) or the name of a format; ``hub``.
        path: The file, or the id of the hub data set.
        limit: Take at most this many.
        offset: Leave out this many valid records first.
        on_error: ``raise`` on the first broken record, or ``skip`` it and go on.
        split: Split of the hub data set.

    Returns:
        The requests, and for each record that was left out its place (``FILE:LINE``) and what is wrong with it.

    Raises:
        DataError: On a broken record (names file and line), or if nothing is left to edit.
    """
    records: Iterable[tuple[str, Any | DataError]]
    if source == "builtin":
        if path is not None:
            raise DataError(f"data.path={path!r} needs data.source=file (or counterfact, zsre, facts, hub)")
        records = _builtin()
    elif not path:
        raise DataError(f"data.source={source} needs data.path, the {'data set id' if source == 'hub' else 'file'}")
    elif source == "hub":
        records = hub_rows(path, split)
    else:
        records = ((f"{path}:{line}", record) for line, record in read_file(expand(path)))
    form = source if source in FORMATS else "auto"
    requests: list[EditRequest] = []
    skipped: list[tuple[str, str]] = []
    seen: dict[str, str] = {}
    wanted = None if limit is None else offset + limit
    for number, (place, record) in enumerate(records, 1):
        if wanted is not None and len(requests) >= wanted:
            break
        try:
            if isinstance(record, DataError):
                raise record
            found = read_record(record, number, form)
            if twice := [request.id for request in found if request.id in seen]:
                raise DataError(f"duplicate id {twice[0]!r}, first used at {seen[twice[0]]}")
        except DataError as error:
            if on_error == "raise":
                raise DataError(f"{place}: {error} (leave such records out with --data.on_error skip)") from None
            skipped.append((place, str(error)))
            continue
        seen |= {request.id: place for request in found}
        requests += [replace(request, place=place) for request in found]
    requests = requests[offset:wanted]
    if not requests:
        behind = f"; nothing is left behind data.offset={offset}" if offset else ""
        first = ": ".join(skipped[0]) if skipped else ""
        left_out = f"; {counted(len(skipped), 'broken record')} left out, the first: {first}" if skipped else ""
        raise DataError(f"{path or source}: no edits to make{left_out}{behind}")
    if skipped:
        lines = [": ".join(left) for left in skipped[:20]] + (["..."] if len(skipped) > 20 else [])
        log.warning("%s left out:\n  %s", counted(len(skipped), "broken record"), "\n  ".join(lines))
    return requests, skipped


def builtin_text(name: str) -> str:
    """Return a text file that ships with the package."""
    return files("lit_edit.data").joinpath(name).read_text(encoding="utf-8")


def _builtin() -> Iterator[tuple[str, Any]]:
    for number, record in enumerate(json.loads(builtin_text("builtin_facts.json")), 1):
        yield f"builtin_facts.json, record {number}", record


def hub_rows(name: str, split: str) -> Iterator[tuple[str, Any]]:
    """Yield the place and content of each row of a hub data set; :class:`DataError` if it cannot be loaded."""
    from datasets import load_dataset

    try:
        with reaching_hub():
            rows = load_dataset(name, split=split)
    except Exception as error:  # the hub client raises many kinds; all mean the same to the user
        reason = hub_fault(error)
        instead = " (without the hub: --data FILE)" if reason != str(error) else ""
        raise DataError(f"hub data set {name!r} (split {split!r}) cannot be loaded: {reason}{instead}") from error
    for number, row in enumerate(rows):
        yield f"{name}, row {number}", row
