"""Pictures of one look, drawn without a display and put in place whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_edit.files.paths import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which are told apart with any kind of colour vision; yellow is left out, it is too pale.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "h")
STYLES: tuple[Any, ...] = ("-", (0, (7, 1.5, 1.5, 1.5)), (0, (1.5, 1)))  # after so many colours come again


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """Return an empty figure, in inches."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display needed

    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", parse_math=False)
    return figure


def add_panel(
    figure: Figure,
    place: tuple[int, int, int],
    heading: str = "",
    name: str | None = None,
    *,
    x_label: str = "",
    whole: bool = False,
    grid: bool = True,
) -> Axes:
    """Add a panel at ``place``: rows and columns of panels, and which of them it is, from 1.

    It is found again by its ``name``; ``whole`` numbers stand along its x axis; lines (``grid``) help to read values.
    """
    from matplotlib.ticker import MaxNLocator

    axis = figure.add_subplot(*place, gid=name)
    axis.set_title(heading, fontsize=11, loc="left")
    axis.set_xlabel(x_label)
    axis.spines[["top", "right"]].set_visible(False)
    if grid:
        axis.grid(alpha=0.25, linewidth=0.7)
    if whole:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return axis


def looks_of(count: int) -> list[dict[str, Any]]:
    """Return a look for each of so many lines; the first are drawn below, and broader: what coincides stays visible."""
    return [
        {
            "color": COLOURS[index % len(COLOURS)],
            "linestyle": STYLES[index // len(COLOURS) % len(STYLES)],
            "linewidth": 4.2 - 2.8 * index / (count - 1) if count > 1 else 2.0,
            "marker": MARKERS[index % len(MARKERS)],
            "markersize": 9.5 - 3.0 * index / (count - 1) if count > 1 else 6.0,
            "markeredgecolor": "white",
            "markeredgewidth": 0.6,
            "zorder": 3 + index / 100,
        }
        for index in range(count)
    ]


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG, atomically."""
    write_atomically(path, lambda part: figure.savefig(part, format="png", dpi=140))
