"""Tables for a terminal."""

from __future__ import annotations

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table


def print_whole(*things: RenderableType) -> None:
    """Print things; tables none of whose columns wraps are never cut, also where the output is no terminal."""
    console = Console()
    options = console.options.update(max_width=10_000)
    rigid = [t for t in things if isinstance(t, Table) and t.columns and all(c.no_wrap for c in t.columns)]
    needed = max((Measurement.get(console, options, table).maximum for table in rigid), default=0)
    wide = Console(width=max(console.width, needed), highlight=False)
    for thing in things:
        wide.print(thing, crop=False)
