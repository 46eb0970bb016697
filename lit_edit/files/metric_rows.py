"""Reading the ``metrics.csv`` of a run, whatever a crash has left of it."""

from __future__ import annotations

import csv
from pathlib import Path


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return columns and rows of a ``metrics.csv``, as far as they can be read.

    A process or a machine that goes down leaves half a line at the end, or NULs; such lines are left out, and whatever
    else is not a row. Cells are text, as they stand in the file; empty ones mean that there is no value.
    """
    try:
        with path.open("rb") as file:
            columns = next(csv.reader(map(bytes.decode, file)), [])
            if columns[:1] != ["step"] or len(set(columns)) < len(columns):
                return [], []
            return columns, [row for line in file if (row := _parse(line, columns)) is not None]
    except (FileNotFoundError, ValueError, csv.Error):  # the last two: of the header
        return [], []


def _parse(line: bytes, columns: list[str]) -> dict[str, str] | None:
    """Return the row that a line holds, or nothing if it is damaged."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = dict(zip(columns, next(csv.reader([line.decode()]), []), strict=True))
        int(row["step"])
        for cell in filter(None, row.values()):
            float(cell)
    except (ValueError, csv.Error):
        return None
    return row
