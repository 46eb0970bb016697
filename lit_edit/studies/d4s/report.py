"""The tables and figures of ``study d4s``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_edit.files.pictures import add_panel, looks_of, new_figure
from lit_edit.studies.frame import as_cell
from lit_edit.sweeps.comparison import COMPARED, Course, draw_comparison, draw_panel, read_course
from lit_edit.sweeps.gathering import COSTS, is_done, row_of, shown, state_of
from lit_edit.sweeps.grids import Grid
from lit_edit.sweeps.outputs import as_markdown, write_outputs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ACCURACY, GROWTH = "efficacy/accuracy", "mean |W|"

Row = dict[str, Any]


def write_part(part: str, grid: Grid, folder: Path) -> str:
    """Write ``<part>.md``, ``.csv`` and ``.png``; return the table with a line above that says what it shows."""
    said, rows, figure = _PARTS[part](grid, folder)
    text = f"{said}\n\n{as_markdown(rows)}" if rows else f"{said}\n\nNothing has been measured yet.\n"
    return write_outputs(folder, part, text, rows, figure)


def _runs(grid: Grid, folder: Path) -> dict[str, Path]:
    [axis] = grid.axes
    return {point.labels[axis]: folder / point.name for point in grid.points}


def _courses(grid: Grid, folder: Path) -> list[Course]:
    return [read_course(label, state_of(run), run) for label, run in _runs(grid, folder).items()]


# ---- a: what is kept, b: mean |W| -----------------------------------------------------------------------------------


def _kept(grid: Grid, folder: Path) -> tuple[str, list[Row], Figure]:
    courses = _courses(grid, folder)
    said = (
        "Accuracy over the edits made so far (all target words first choices), by the number of edits; of more than a "
        "hundred a sample of a hundred, at the end all:"
    )
    return said, curve_table(courses, ACCURACY), draw_comparison(courses, "accuracy", title="What is kept of a stream")


def curve_table(courses: Sequence[Course], quantity: str) -> list[Row]:
    """Return a row per number of edits, with a column per editor.

    Example:
        >>> curve_table([Course("d4s", "done", series={"x": [(25, 1.0), (50, 0.5)]})], "x")
        [{'edits': '25', 'd4s': '1.000'}, {'edits': '50', 'd4s': '0.500'}]
    """
    by_editor = {course.editor: dict(course.series.get(quantity, ())) for course in courses}
    numbers = sorted({number for series in by_editor.values() for number in series})
    return [
        {"edits": str(number)} | {name: as_cell(series.get(number)) for name, series in by_editor.items()}
        for number in numbers
    ]


def _norms(grid: Grid, folder: Path) -> tuple[str, list[Row], Figure]:
    courses = _courses(grid, folder)
    rows = []
    pairs: dict[str, list[tuple[float, float]]] = {course.editor: growth_and_accuracy(course) for course in courses}
    pairs["all together"] = [pair for own in pairs.values() for pair in own]
    for name, own in pairs.items():
        pearson, spearman = correlations(own)
        last = own[-1] if own and name != "all together" else (None, None)
        rows.append(
            {
                "editor": name,
                "points": str(len(own)),
                "growth of mean |W| at the end": "–" if last[0] is None else f"{last[0] - 1:+.1%}",
                "accuracy at the end": as_cell(last[1]),
                "Pearson": as_cell(pearson, "+.2f"),
                "Spearman": as_cell(spearman, "+.2f"),
            }
        )
    said = "Growth of mean |W| (of the edited layer that has grown most) and accuracy at the same numbers of edits:"
    return said, rows if pairs["all together"] else [], _draw_norms(courses, pairs)


def growth_and_accuracy(course: Course) -> list[tuple[float, float]]:
    """Return mean |W| relative to the unedited model and accuracy, wherever both were measured."""
    accuracy = dict(course.series.get(ACCURACY, ()))
    return [(value, accuracy[number]) for number, value in course.series.get(GROWTH, ()) if number in accuracy]


def correlations(pairs: Sequence[tuple[float, float]]) -> tuple[float | None, float | None]:
    """Return Pearson's and Spearman's coefficient; ``None`` where one of the two does not vary, or points are few.

    Example:
        >>> correlations([(1.0, 1.0), (1.1, 0.9), (1.5, 0.8)])
        (-0.945, -1.0)
        >>> correlations([(1.0, 1.0), (1.1, 1.0), (1.2, 1.0)])
        (None, None)
    """
    if len(pairs) < 3 or any(len(set(column)) < 2 for column in zip(*pairs, strict=True)):
        return None, None
    from scipy.stats import pearsonr, spearmanr

    pearson, spearman = (round(float(of(*zip(*pairs, strict=True)).statistic), 3) for of in (pearsonr, spearmanr))
    return pearson, spearman


def _draw_norms(courses: Sequence[Course], pairs: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = new_figure(13.8, 3.8)
    panels = ((ACCURACY, "Accuracy over the edits so far"), (GROWTH, "Growth of mean |W| (unedited: 1)"))
    for place, (quantity, heading) in enumerate(panels, 1):
        draw_panel(add_panel(figure, (1, 3, place), heading, quantity, x_label="edits"), quantity, courses)
    axis = add_panel(figure, (1, 3, 3), "Accuracy against growth", x_label="growth of mean |W|")
    for course, look in zip(courses, looks_of(len(courses)), strict=True):
        if own := pairs[course.editor]:
            axis.plot(*zip(*own, strict=True), **look | {"linestyle": ""})
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0), numticks=12))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    if any(pairs.values()):
        figure.axes[0].legend(frameon=False, fontsize=9)
    return figure


# ---- c and d: general ability ---------------------------------------------------------------------------------------


def _ability(grid: Grid, folder: Path) -> tuple[str, list[Row], Figure]:
    [axis] = grid.axes
    runs = _runs(grid, folder)
    found = {name: read_points(run) for name, run in runs.items()}
    tasks = list(dict.fromkeys(task for points in found.values() for values in points.values() for task in values))
    numbers = sorted({number for points in found.values() for number in points})
    rows = [
        {"task": task, axis: name}
        | {f"after {n}" if n else "before": as_cell(_of_task(points.get(n, {}), task)) for n in numbers}
        for task in (*tasks, *(["mean"] if tasks else []))
        for name, points in found.items()
    ]
    figure = new_figure(4.6, 3.8)
    panel: Any = add_panel(figure, (1, 1, 1), "Mean accuracy over the tasks (95 %)", x_label="edits")
    for (name, points), look in zip(found.items(), looks_of(len(found)), strict=True):
        if points:
            means = [_of_task(values, "mean") for values in points.values()]
            items = read_items(runs[name])
            bars = [1.96 * mean_error(values, items) for values in points.values()]
            panel.errorbar(list(points), means, bars, capsize=3, elinewidth=0.8, label=name, **look)
    if tasks:
        panel.legend(frameon=False)
    return "Accuracy on few-shot tasks (the likeliest option), by the number of edits:", rows, figure


def _read_ability(run: Path) -> dict[str, Any]:
    """Return what was measured of a finished run, in the run (part c) or afterwards (part d)."""
    if not is_done(run):
        return {}
    measured = run / "ability" / "ability.json"
    if measured.is_file():
        found: dict[str, Any] = json.loads(measured.read_text(encoding="utf-8"))
        return found
    return json.loads((run / "summary.json").read_text(encoding="utf-8")).get("ability") or {}


def read_items(run: Path) -> dict[str, int]:
    """Return the number of items of each task that a finished run was measured on."""
    return {task: int(values["items"]) for task, values in (_read_ability(run).get("base") or {}).items()}


def mean_error(values: Mapping[str, float], items: Mapping[str, int]) -> float:
    """Return the standard error of a mean accuracy over tasks, from the binomial one of each.

    Example:
        >>> mean_error({"a": 0.5, "b": 1.0}, {"a": 100, "b": 100})
        0.025
    """
    known = [(value, items[task]) for task, value in values.items() if items.get(task)]
    return math.sqrt(sum(p * (1 - p) / n for p, n in known)) / max(1, len(known))


def read_points(run: Path) -> dict[int, dict[str, float]]:
    """Return a finished run's accuracies by number of edits and task."""
    found = _read_ability(run)
    points: dict[int, dict[str, float]] = {}
    for point in found.get("points", ()):
        parts = {name.split("/")[1]: value for name, value in point.items() if name.endswith("/accuracy")}
        points[int(point["edits"])] = {task: float(value) for task, value in parts.items()}
    return points


def _of_task(values: Mapping[str, float], task: str) -> float | None:
    if task != "mean":
        return values.get(task)
    return sum(values.values()) / len(values) if values else None


# ---- e: the ablation ------------------------------------------------------------------------------------------------


def _ablation(grid: Grid, folder: Path) -> tuple[str, list[Row], Figure]:
    [axis] = grid.axes
    rows = [row_of(point, folder / point.name, COMPARED) for point in grid.points]
    table = shown(rows, [axis, "state", "edits", *COMPARED, *COSTS])
    return "Each line changes one thing of the first:", table, draw_comparison(_courses(grid, folder), "accuracy")


_PARTS: dict[str, Callable[[Grid, Path], tuple[str, list[Row], Any]]] = {
    "a": _kept,
    "b": _norms,
    "c": _ability,
    "d": _ability,
    "e": _ablation,
}
