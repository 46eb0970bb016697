"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table


def table_of(headings: Iterable[str], rows: Iterable[Iterable[Any]], whole: bool = False, **more: Any) -> Table:
    """Return a table of cells, taken as they are (brackets are no markup); ``None`` is a dash.

    A ``>`` before a heading sets its cells to the right; if ``whole``, no cell is ever cut or wrapped. ``more`` is as
    for :class:`rich.table.Table`.
    """
    table = Table(**{"title_justify": "left", **more})
    for heading in headings:
        justify: Literal["left", "right"] = "right" if heading[:1] == ">" else "left"
        table.add_column(heading.removeprefix(">"), justify=justify, no_wrap=whole, overflow="fold")
    for row in rows:
        table.add_row(*("–" if cell is None else escape(str(cell)) for cell in row))
    return table


def print_whole(*things: RenderableType) -> None:
    """Print things; tables none of whose columns wraps are never cut, also where the output is no terminal."""
    console = Console()
    options = console.options.update(max_width=10_000)
    rigid = [t for t in things if isinstance(t, Table) and t.columns and all(c.no_wrap for c in t.columns)]
    needed = max((Measurement.get(console, options, table).maximum for table in rigid), default=0)
    wide = Console(width=max(console.width, needed), highlight=False)
    for thing in things:
        wide.print(thing, crop=False)
