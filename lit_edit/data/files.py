"""Reading files of records, with the line of each, so that an error can name it."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lit_edit.data.request import DataError
from lit_edit.errors import shorten

SUFFIXES = (".json", ".jsonl", ".csv")


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8; a :class:`DataError` names it and, where the text is at fault, the line."""
    if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe might never end
        kind = "a folder" if os.path.isdir(path) else "no ordinary file"
        raise DataError(f"{path}: is {kind}; expected a file ({', '.join(SUFFIXES)})")
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{shorten(str(path))}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in the name
        raise DataError(f"{str(path)!r}: cannot be read: {error}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    if (at := text.find("\x00")) >= 0:
        raise DataError(f"{path}:{_line(text, at)}: holds a NUL character; save the file as UTF-8 (is it UTF-16?)")
    return text


def read_file(path: Path) -> Iterator[tuple[int, Any | DataError]]:
    """Yield ``(line, record)`` for each record of a file, or ``(line, DataError)`` for one that cannot be read.

    It is a ``.json`` list, ``.jsonl`` (a record per line) or ``.csv`` (with a header) in UTF-8. The :class:`DataError`
    that is raised is about the file as a whole.
    """
    if path.suffix.lower() not in SUFFIXES and not os.path.isdir(path):
        raise DataError(f"{path}: unknown kind of file {path.suffix!r}; expected one of {', '.join(SUFFIXES)}")
    text = read_text(path)
    yield from {".json": _json, ".jsonl": _jsonl, ".csv": _csv}[path.suffix.lower()](path, text)


def _json(path: Path, text: str) -> Iterator[tuple[int, Any | DataError]]:
    """A list of records, decoded one by one so that each has its line."""
    decoder = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_object)
    at = _skip_space(text, 0)
    if text[at : at + 1] != "[":
        hint = "; a file with a record per line is named .jsonl" if text[at : at + 1] == "{" else ""
        raise DataError(f"{path}:{_line(text, at)}: expected a JSON list of records ('['){hint}")
    at = _skip_space(text, at + 1)
    line, counted = 1, 0
    if text[at : at + 1] != "]":
        while True:
            line, counted = line + text.count("\n", counted, at), at
            try:
                record, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{error.lineno}: bad JSON: {error.msg}") from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{line}: bad JSON: {error}") from None
            yield line, record
            at = _skip_space(text, at)
            if text[at : at + 1] != ",":
                break
            at = _skip_space(text, at + 1)
    if text[at : at + 1] != "]":
        raise DataError(f"{path}:{_line(text, min(at, len(text) - 1))}: bad JSON: expected ',' or ']'")
    at = _skip_space(text, at + 1)
    if at < len(text):
        raise DataError(f"{path}:{_line(text, at)}: text after the end of the list")


def _jsonl(path: Path, text: str) -> Iterator[tuple[int, Any | DataError]]:
    for line, row in enumerate(text.split("\n"), 1):
        if not row.strip():
            continue
        try:
            yield line, json.loads(row, parse_constant=_refuse_constant, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            yield line, DataError(f"bad JSON: {getattr(error, 'msg', error)}")


def _csv(path: Path, text: str) -> Iterator[tuple[int, Any | DataError]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1  # where the record at hand begins
    try:
        names = [name.strip() for name in next(reader, [])]
        _check_header(path, names)
        line = reader.line_num + 1
        for cells in reader:
            if len(cells) > len(names):
                yield line, DataError(f"more cells than the header has columns ({len(names)})")
            elif cells:
                yield line, {name: value for name, value in zip(names, cells, strict=False) if value}
            line = reader.line_num + 1
    except csv.Error as error:
        open_quote = "a quoted cell of this row does not end" if "unexpected end" in str(error) else error
        raise DataError(f"{path}:{line}: bad CSV: {open_quote}") from None


def _check_header(path: Path, names: list[str]) -> None:
    if not any(names):
        raise DataError(f"{path}:1: the file is empty; expected a header (prompt,subject,target_new)")
    if twice := repeated(names):
        raise DataError(f"{path}:1: a column name occurs twice: {shorten(twice[0])!r}")
    for mark in (";", "\t"):
        if len(names) == 1 and mark in names[0]:
            raise DataError(f"{path}:1: expected commas between the columns, got {mark!r}: {shorten(names[0])!r}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its members; JSON itself would silently keep the last of two with one name."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError(f"{shorten(repeated(name for name, _ in pairs)[0])!r} occurs twice in an object")
    return made


def repeated(names: Iterable[str]) -> list[str]:
    """Return the names that occur more than once."""
    return [name for name, count in Counter(names).items() if count > 1]


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1
