"""Plain texts: lines of a file, or records with a field of text."""

from __future__ import annotations

from pathlib import Path

from lit_edit.data.files import SUFFIXES, read_file, read_text
from lit_edit.data.request import DataError, find_fault


def read_documents(path: Path) -> list[str]:
    """Read texts from a file: lines of text, or records with a ``text`` or ``Text`` field; there must be some."""
    records = read_file(path) if path.suffix.lower() in SUFFIXES else enumerate(read_text(path).splitlines(), 1)
    texts = []
    for line, record in records:
        text = _text_of(record)
        if problem := record if isinstance(record, DataError) else find_fault(text):
            raise DataError(f"{path}:{line}: {problem}")
        if text.strip():
            texts.append(text)
    if not texts:
        raise DataError(f"{path}: holds no text (expected lines, or records with a 'text' field)")
    return texts


def _text_of(record: object) -> str:
    if isinstance(record, dict):
        record = record.get("text", record.get("Text", ""))
    return record if isinstance(record, str) else ""
