"""Tables for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType


def print_whole(*things: RenderableType) -> None:
    """Print things as wide as the widest of them must be: no cell is cut, also where the output is no terminal."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console()
    options = console.options.update(max_width=10_000)
    needed = max(Measurement.get(console, options, thing).minimum for thing in things)
    for thing in things:
        console.print(thing, width=max(console.width, needed), highlight=False, crop=False)
