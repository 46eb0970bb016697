"""The tables and the figure of ``study mqd``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_edit.files.pictures import COLOURS, add_panel, new_figure
from lit_edit.studies.frame import as_cell
from lit_edit.sweeps.comparison import Course, draw_panel, read_course
from lit_edit.sweeps.gathering import COSTS, failure_of, row_of, shown
from lit_edit.sweeps.grids import Grid
from lit_edit.sweeps.outputs import as_markdown, write_outputs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AXIS = "kind"
MEASURED = {
    "accuracy before": ("base", "efficacy", "accuracy"),
    "accuracy at the edit": ("immediate", "efficacy", "accuracy"),
    "accuracy": ("final", "efficacy", "accuracy"),
    "paraphrase accuracy before": ("base", "generalization", "accuracy"),
    "paraphrase accuracy": ("final", "generalization", "accuracy"),
    "neighbour accuracy before": ("base", "locality", "accuracy"),
    "neighbour accuracy": ("final", "locality", "accuracy"),
    "agreement": ("final", "locality", "agreement"),
}
"""By column: where ``summary.json`` has it."""

_COLUMNS = {  # by measurement: heading, and form
    "edits": ("number", "d"),
    "perplexity": ("perplexity", ".1f"),
    "first_choice": ("said anyway", ".3f"),
    "nats": ("nats", ".2f"),
    "tokens": ("tokens", ".2f"),
    "kinds": ("different", "d"),
    "entropy": ("entropy, bits", ".2f"),
    "distinct_1": ("distinct-1", ".3f"),
    "distinct_2": ("distinct-2", ".3f"),
}


def write_report(grid: Grid, folder: Path, targets: Mapping[str, Any]) -> str:
    """Write ``mqd.md``, ``mqd.csv``, ``mqd.json`` and ``mqd.png``; return the tables as Markdown.

    ``targets`` is what was measured of the targets, and on which model.
    """
    rows = [row_of(point, folder / point.name, MEASURED) for point in grid.points]
    courses = [read_course(row[AXIS], row["state"], folder / row["point"]) for row in rows]
    for row, course in zip(rows, courses, strict=True):
        row["edits"] = row["edits"] or course.edits or None
    by_kind = {row[AXIS]: row for row in targets["targets"] if row["of"] == "edited"}
    number = targets["edits"]
    text = f"# {grid.name}\n\nTargets on the unedited {targets['model']['name']}, all that there are:\n\n"
    text += as_markdown([_shown_target(row) for row in targets["targets"] if row["of"] == "all"])
    text += f"\nTargets of the first {number}, which are edited:\n\n"
    text += as_markdown([_shown_target(row) for row in by_kind.values()])
    text += f"\nAfter {number} sequential edits of one kind:\n\n"
    text += as_markdown(shown(rows, [AXIS, "state", "edits", *MEASURED, *COSTS]))
    for row in rows:
        if (error := failure_of(row, folder / row["point"])) is not None:
            text += f"\n{row[AXIS]} failed: {error}\n"
    joined = [
        {**row, **{f"target {name}": by_kind[row[AXIS]][name] for name in _COLUMNS if name != "edits"}} for row in rows
    ]
    content = {"study": grid.name, "base": list(grid.base), "settings": grid.settings, **targets, "runs": rows}
    figure = draw_study(list(by_kind.values()), courses, f"{grid.name}: {number} edits of each kind")
    return write_outputs(folder, "mqd", text, joined, figure, content)


def _shown_target(row: Mapping[str, Any]) -> dict[str, str]:
    return {AXIS: str(row[AXIS])} | {head: as_cell(row[name], form) for name, (head, form) in _COLUMNS.items()}


def draw_study(targets: Sequence[Mapping[str, Any]], courses: Sequence[Course], title: str = "") -> Figure:
    """Draw the targets of each kind as bars, and below the courses of its edits, in the same order."""
    figure = new_figure(12.5, 7.0, title)
    kinds = [str(row[AXIS]) for row in targets]
    bars = (("perplexity", "Perplexity of the targets"), ("entropy", "Entropy of the targets, bits"))
    for place, (name, heading) in enumerate((*bars, ("tokens", "Tokens in a target")), 1):
        axis = add_panel(figure, (2, 3, place), heading, f"targets/{name}", grid=False)
        drawn = axis.bar(kinds, [row[name] for row in targets], color=COLOURS[: len(kinds)], width=0.6)
        axis.bar_label(drawn, fmt=lambda value: f"{value:,.3g}")
        axis.margins(y=0.12)
    lines = (("efficacy/accuracy", "Edits that hold (accuracy)"), ("perplexity", "Perplexity of ordinary text"))
    for place, (name, heading) in enumerate((*lines, ("mean |W|", "Growth of mean |W| (unedited: 1)")), 4):
        axis = add_panel(figure, (2, 3, place), heading, name, x_label="edits", whole=True)
        draw_panel(axis, name, courses)
        if place == 4:
            axis.set_ylim(-0.03, 1.03)
            axis.legend(frameon=False)
    return figure
