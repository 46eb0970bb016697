"""Results that come one by one and are kept as they come: a JSON line each, so that long work that was cut goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from lit_edit.errors import UserError
from lit_edit.files.changes import refuse_changes
from lit_edit.files.paths import sync_folder, without_nan, write_json

Row = TypeVar("Row")


def read_lines(path: Path, read: Callable[[Mapping[str, Any]], Row]) -> Iterator[Row]:
    """Read results, each made of a line's primitives; a last line that was cut off is taken away.

    The :class:`UserError` for another damaged line names file and line.
    """
    if not path.exists():
        return
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        os.truncate(path, len(whole))
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            yield read(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}:{number}: damaged ({type(error).__name__}: {error}); take the line out, and it is made again"
            ) from None


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Put a result, as primitives, behind the others; it is on disk when this returns."""
    line = json.dumps(without_nan(dict(row)), ensure_ascii=False, allow_nan=False) + "\n"
    with path.open("ab") as file:
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


class ResultsFolder(Generic[Row]):
    """A folder with ``settings.json``, and a file ``name`` with a finished result per line, which ``read`` makes of it.

    ``what`` the folder holds is for messages.
    """

    def __init__(
        self, path: Path, read: Callable[[Mapping[str, Any]], Row], what: str = "search", name: str = "results.jsonl"
    ) -> None:
        self.path, self.read, self.what = path, read, what
        self.results = path / name

    def open(self, settings: Mapping[str, Any]) -> list[Row]:
        """Begin here, or go on: return the results on record. ``settings`` are all that decides about the numbers.

        Raises:
            ArgumentError: If the folder was begun with other settings; :class:`UserError` if its files are damaged.
        """
        wanted = without_nan(json.loads(json.dumps(settings)))
        file = self.path / "settings.json"
        if not file.exists():
            if self.results.exists():
                raise UserError(f"{self.path} holds results but no settings.json; choose another --out")
            write_json(file, wanted)
            return []
        try:
            there = dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{file} is damaged ({error}); choose another --out") from None
        refuse_changes(f"{self.path}: this {self.what} was begun", there, wanted, "give those, or choose another --out")
        return list(read_lines(self.results, self.read))

    def append(self, row: Mapping[str, Any]) -> None:
        """Put a finished result, as primitives, on record."""
        append_line(self.results, row)
