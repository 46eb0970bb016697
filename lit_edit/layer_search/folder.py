"""What is left in a folder while candidates are tried, and how it goes on from there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from lit_edit.errors import ArgumentError, UserError
from lit_edit.paths import sync_folder, write_json

Row = TypeVar("Row")


class ResultsFolder(Generic[Row]):
    """A folder with ``settings.json``, and ``results.jsonl`` with a finished result per line.

    Args:
        path: The folder, which exists.
        read: Makes a result of a line's primitives.
        what: The folder holds, for messages.
    """

    def __init__(self, path: Path, read: Callable[[Mapping[str, Any]], Row], what: str = "search") -> None:
        self.path, self.read, self.what = path, read, what
        self.results = path / "results.jsonl"

    def open(self, settings: Mapping[str, Any]) -> list[Row]:
        """Begin here, or go on: return the results on record.

        Args:
            settings: All that decides about the numbers, as primitives.

        Raises:
            ArgumentError: If the folder holds a {self.what} with other settings.
            UserError: If its files are damaged.
        """
        file = self.path / "settings.json"
        if not file.exists():
            if self.results.exists():
                raise UserError(f"{self.path} holds results but no settings.json; choose another --out")
            write_json(file, dict(settings))
            return []
        try:
            there = json.loads(file.read_text(encoding="utf-8"))
            different = [name for name in {**there, **settings} if there.get(name) != settings.get(name)]
        except (ValueError, TypeError) as error:
            raise UserError(f"{file} is damaged ({error}); choose another --out") from None
        if different:
            pairs = "; ".join(f"{name} was {there.get(name)!r}, is {settings.get(name)!r}" for name in different)
            raise ArgumentError(
                f"{self.path} holds a {self.what} with other settings ({pairs}); give those, or choose another --out"
            )
        return list(self._read())

    def _read(self) -> Iterator[Row]:
        """Read the results; a last line that was cut off is taken away."""
        if not self.results.exists():
            return
        raw = self.results.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            os.truncate(self.results, len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                yield self.read(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self.results}:{number}: damaged ({type(error).__name__}: {error}); take the line out, and it is "
                    "made again"
                ) from None

    def append(self, row: Mapping[str, Any]) -> None:
        """Put a finished result, as primitives, on record; it is on disk when this returns."""
        line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        with self.results.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.path)
