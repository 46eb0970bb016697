"""Reading files of records, with the line of each, so that an error can name it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_edit.data.request import DataError

SUFFIXES = (".json", ".jsonl", ".csv")


def read_file(path: Path) -> Iterator[tuple[int, Any | DataError]]:
    """Yield ``(line, record)`` for each record of a file, or ``(line, DataError)`` for one that cannot be read.

    Args:
        path: A ``.json`` list, ``.jsonl`` (a record per line) or ``.csv`` (with a header) in UTF-8.

    Raises:
        DataError: If the file as a whole cannot be read; names file and line.
    """
    if path.is_dir():
        raise DataError(f"{path}: is a folder; expected a file ({', '.join(SUFFIXES)})")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{path}: unknown kind of file {path.suffix!r}; expected one of {', '.join(SUFFIXES)}")
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    read = {".json": _json, ".jsonl": _jsonl, ".csv": _csv}[path.suffix.lower()]
    yield from read(path, text)


def _json(path: Path, text: str) -> Iterator[tuple[int, Any | DataError]]:
    """A list of records, decoded one by one so that each has its line."""
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    at = _skip_space(text, 0)
    if text[at : at + 1] != "[":
        raise DataError(f"{path}:{_line(text, at)}: expected a JSON list of records ('[')")
    at = _skip_space(text, at + 1)
    if text[at : at + 1] == "]":
        return
    while True:
        line = _line(text, at)
        try:
            record, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: bad JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}: bad JSON: {error}") from None
        yield line, record
        at = _skip_space(text, at)
        mark = text[at : at + 1]
        if mark == "]":
            at = _skip_space(text, at + 1)
            if at < len(text):
                raise DataError(f"{path}:{_line(text, at)}: text after the end of the list")
            return
        if mark != ",":
            raise DataError(f"{path}:{_line(text, min(at, len(text) - 1))}: bad JSON: expected ',' or ']'")
        at = _skip_space(text, at + 1)


def _jsonl(path: Path, text: str) -> Iterator[tuple[int, Any | DataError]]:
    for line, row in enumerate(text.split("\n"), 1):
        if not row.strip():
            continue
        try:
            yield line, json.loads(row, parse_constant=_refuse_constant)
        except json.JSONDecodeError as error:
            yield line, DataError(f"bad JSON: {error.msg}")
        except (ValueError, RecursionError) as error:
            yield line, DataError(f"bad JSON: {error}")


def _csv(path: Path, text: str) -> Iterator[tuple[int, Any | DataError]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        names = [name.strip() for name in next(reader, [])]
        if not names:
            raise DataError(f"{path}:1: the file is empty; expected a header (prompt,subject,target_new)")
        if len(set(names)) < len(names):
            raise DataError(f"{path}:1: a column name occurs twice")
        line = reader.line_num + 1
        for cells in reader:
            if len(cells) > len(names):
                yield line, DataError(f"more cells than the header has columns ({len(names)})")
            elif cells:
                yield line, {name: value for name, value in zip(names, cells, strict=False) if value}
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: bad CSV: {error}") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1
