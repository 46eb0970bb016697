"""The table and figure of ``study batch-size``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_edit.files.pictures import add_panel, looks_of, new_figure
from lit_edit.sweeps.comparison import LOGARITHMIC
from lit_edit.sweeps.gathering import COSTS, METRICS, failure_of, row_of, shown, with_failures
from lit_edit.sweeps.grids import Grid
from lit_edit.sweeps.outputs import as_markdown, write_outputs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EDITOR, BATCH = "editor", "data.batch_size"
ALL = "all"
"""Label of the step that holds every edit."""
SHOWN = (EDITOR, "batch", "state", "edits", *METRICS, "score", *COSTS)
PANELS = {
    "efficacy success": "Efficacy success",
    "efficacy accuracy": "Efficacy accuracy",
    "generalization success": "Generalization success",
    "locality success": "Locality success",
    "score": "Score (harmonic mean of the successes)",
    "perplexity change": "Perplexity (unedited: 1)",
    "largest growth of mean |W|": "Growth of mean |W| (unedited: 1)",
    "seconds per edit": "Seconds per edit",
}
"""By column of the table: the heading of its panel."""
SHARES = tuple(PANELS)[:5]
_CHANGES = ("perplexity change", "largest growth of mean |W|")

Row = dict[str, Any]


def write_report(grid: Grid, folder: Path) -> str:
    """Write ``batch_size.md``, ``.csv`` and ``.png`` of the study; return the table as Markdown."""
    rows = [_row(point, folder / point.name) for point in grid.points]
    text = f"# {grid.name}\n\n{as_markdown(shown(rows, SHOWN))}"
    text = with_failures(text, [f"{row[EDITOR]}, {row['batch']}: {row['error']}" for row in rows if row["error"]])
    return write_outputs(folder, "batch_size", text, rows, draw_batches(rows))


def _row(point: Any, run: Path) -> Row:
    row = row_of(point, run)
    batch = row.pop(BATCH)
    row = {EDITOR: row.pop(EDITOR), "batch": batch, **row, "score": None, "error": failure_of(row, run)}
    if row["edits"] is not None:
        row["score"] = json.loads((run / "summary.json").read_text(encoding="utf-8"))["final"].get("score")
    return row


def lines_of(rows: Sequence[Mapping[str, Any]], column: str) -> dict[str, list[tuple[int, float]]]:
    """Return by editor the points of a panel: edits in a step, and the value; changes are relative to 1.

    Example:
        >>> rows = [{"editor": "d4s", "batch": b, "edits": 64, "score": s} for b, s in (("all", 0.5), ("4", 0.25))]
        >>> lines_of(rows, "score")
        {'d4s': [(4, 0.25), (64, 0.5)]}
    """
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        line = lines.setdefault(row[EDITOR], [])
        if row["edits"] is None or row[column] is None:
            continue
        size = row["edits"] if row["batch"] == ALL else int(row["batch"])
        line.append((size, row[column] + (column in _CHANGES)))
    return {editor: sorted(line) for editor, line in lines.items()}


def draw_batches(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw a panel per quantity with a line per editor over the edits in a step; the largest step holds them all."""
    figure = new_figure(16, 7.6)
    for place, (column, heading) in enumerate(PANELS.items(), 1):
        x_label = "edits in a step" if place > 4 else ""
        axis = add_panel(figure, (2, 4, place), heading, column, x_label=x_label)
        _draw_panel(axis, lines_of(rows, column), is_share=column in SHARES)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def _draw_panel(axis: Axes, lines: Mapping[str, Sequence[tuple[int, float]]], is_share: bool) -> None:
    for (editor, line), look in zip(lines.items(), looks_of(len(lines)), strict=True):
        seen = [(size, value) for size, value in line if math.isfinite(value)]
        axis.plot(*zip(*seen, strict=True) if seen else ((), ()), label=editor, gid=editor, **look)
    sizes = sorted({size for line in lines.values() for size, _ in line})
    values = [value for line in lines.values() for _, value in line if math.isfinite(value)]
    if not values:
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color="0.5")
        return
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()
    if is_share:  # differences of some hundredths are no mountains
        low, high = min(values), max(values)
        room = max(0.01, (0.2 - (high - low)) / 2)
        axis.set_ylim(max(-0.02, low - room), min(1.02, high + room))
    elif 0 < min(values) * LOGARITHMIC < max(values):
        axis.set_yscale("log")
