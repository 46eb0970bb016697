"""What a sweep or a study leaves beside its runs: a text, a table, the numbers and a picture, of one name."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_edit.files.paths import write_json, write_text
from lit_edit.files.pictures import write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_outputs(
    folder: Path,
    name: str,
    text: str,
    rows: Sequence[Mapping[str, Any]] = (),
    figure: Figure | None = None,
    content: Mapping[str, Any] | None = None,
) -> str:
    """Write Markdown to ``<name>.md`` and, of what is given, table, numbers and picture beside it; return the text."""
    write_text(folder / f"{name}.md", text)
    if rows:
        write_text(folder / f"{name}.csv", as_csv(rows))
    if content is not None:
        write_json(folder / f"{name}.json", content)
    if figure is not None:
        write_figure(folder / f"{name}.png", figure)
    return text


def as_markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Return rows as a table whose columns stand below each other."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |\n" for line in lines
    )


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a CSV file, every digit kept; without rows an empty one."""
    file = io.StringIO()
    if rows:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return file.getvalue()
