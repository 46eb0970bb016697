"""What a comparison of editors comes to: a row per editor, curves over the edits, and their picture."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_edit.errors import counted
from lit_edit.files.metric_rows import read_rows
from lit_edit.files.pictures import add_panel, looks_of, new_figure
from lit_edit.sweeps import gathering
from lit_edit.sweeps.gathering import COSTS, METRICS, failure_of, row_of, with_failures
from lit_edit.sweeps.grids import Grid
from lit_edit.sweeps.outputs import as_markdown, write_outputs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

AXIS = "editor"
COMPARED = {
    **{name: place for name, place in METRICS.items() if name.startswith("efficacy")},
    "efficacy success at the edit": ("immediate", "efficacy", "success"),
    "efficacy accuracy at the edit": ("immediate", "efficacy", "accuracy"),
    **{name: place for name, place in METRICS.items() if not name.startswith("efficacy")},
}
"""By column: where ``summary.json`` has it."""
MEASURES = ("success", "accuracy")

Series = list[tuple[int, float]]
"""Numbers of edits, and values."""


@dataclass(frozen=True)
class Course:
    """What happened to a model over the edits of one editor."""

    editor: str  # its label
    state: str  # how far its run is: sweeps.gathering.state_of
    edits: int = 0  # how many it has made
    base: Mapping[str, float] = field(default_factory=dict)  # by quantity: before the first edit
    series: Mapping[str, Series] = field(default_factory=dict)  # by efficacy/success, perplexity, mean |W|: on the way

    @property
    def is_cut(self) -> bool:
        """Whether it has not come to its end."""
        return self.state == "begun" or self.state.startswith("failed")

    @property
    def label(self) -> str:
        """The editor, and what a reader must know of where its lines end."""
        if self.state in ("not run", "left out"):
            return f"{self.editor} ({self.state})"
        if self.state.startswith("failed"):
            return f"{self.editor} (failed after {counted(self.edits, 'edit')})"
        return f"{self.editor} ({counted(self.edits, 'edit')} so far)" if self.state == "begun" else self.editor


def read_course(editor: str, state: str, folder: Path) -> Course:
    """Read the course of a run from its ``metrics.csv``, as far as it has come."""
    _, rows = read_rows(folder / "metrics.csv")
    base: dict[str, float] = {}
    series: dict[str, Series] = {}
    widths: dict[str, float] = {}  # mean |W| of each layer before the first edit
    for row in rows:
        edits, values = int(row["step"]), {name: float(cell) for name, cell in row.items() if cell}
        found = _at_stage(values, "retention") | _at_stage(values, "final")  # the end is measured over all edits
        for name, value in _at_stage(values, "base").items():
            base.setdefault(name, value)
        norms = {name: value for name, value in values.items() if re.fullmatch(r"norm/.+/mean_abs_w", name)}
        widths = widths or norms
        growth = [value / widths[name] for name, value in norms.items() if widths.get(name)]
        if growth:
            found["mean |W|"] = max(growth)
            base.setdefault("mean |W|", 1.0)
        for name, value in found.items():
            series.setdefault(name, []).append((edits, value))
    return Course(editor, state, max((int(row["step"]) for row in rows), default=0), base, series)


def _at_stage(values: Mapping[str, float], stage: str) -> dict[str, float]:
    return {name.removeprefix(f"{stage}/"): v for name, v in values.items() if name.startswith(f"{stage}/")}


# ---- the table ----------------------------------------------------------------------------------------------------


def write_comparison(grid: Grid, folder: Path, measure: str = "success") -> list[dict[str, Any]]:
    """Write ``compare.md``, ``.csv``, ``.json`` and ``.png`` of a comparison; return the rows of the table.

    ``measure``, ``success`` or ``accuracy``, is what is drawn of efficacy and generalization.
    """
    rows, courses = [], []
    for point in grid.points:
        row = row_of(point, folder / point.name, COMPARED)
        course = read_course(point.labels[AXIS], row["state"], folder / point.name)
        if row["edits"] is None and course.edits:
            row["edits"] = course.edits
        rows.append(row | {"error": failure_of(row, folder / point.name)})
        courses.append(course)
    text = f"# {grid.name}\n\n{as_markdown(shown(rows))}"
    for heading, left_out in (("Failed", False), ("Left out", True)):
        told = [row for row in rows if row["error"] and (row["state"] == "left out") is left_out]
        text = with_failures(text, [f"{row[AXIS]}: {row['error']}" for row in told], heading)
    begun = [course for course in courses if course.state not in ("not run", "left out")]  # the table says what was not
    figure = draw_comparison(begun or courses, measure, title=grid.name)
    content = {"comparison": grid.name, "settings": grid.settings, "editors": rows}
    write_outputs(folder, "compare", text, rows, figure, content)
    return rows


def shown(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the rows as tables show them."""
    return gathering.shown(rows, [AXIS, "state", "edits", *COMPARED, *COSTS])


# ---- the picture --------------------------------------------------------------------------------------------------

BASE: Any = {"color": "0.45", "linestyle": (0, (4, 3)), "linewidth": 1.1, "zorder": 1}
LOGARITHMIC = 4
"""Where the largest value is more times the smallest, curves near the latter would lie on each other otherwise."""
LEAST_SPAN = {"perplexity": 0.05, "mean |W|": 0.005}
"""How much of its values an axis shows at least: smaller differences are to look small."""


def draw_comparison(courses: Sequence[Course], measure: str = "success", title: str = "") -> Figure:
    """Draw what happens to a model over the edits, one line per editor in every panel.

    Lines that coincide stay visible: the first is the broadest, the last the thinnest and on top. A line that ends
    before its stream does ends with a cross; a value that is not finite is a triangle at the upper edge. Where the
    ``measure`` of efficacy and generalization (``success`` or ``accuracy``) is not known, the other is drawn.
    """
    figure = new_figure(13.5, 7.4, title)
    names = [_quantity(courses, kind, measure) for kind in ("efficacy", "generalization", "locality")]
    panels = [(name, name.replace("/", " ").capitalize()) for name in names]
    panels += [("perplexity", "Perplexity of ordinary text"), ("mean |W|", "Growth of mean |W| (unedited: 1)")]
    last = max((course.edits for course in courses), default=0)
    for place, (quantity, heading) in enumerate(panels, 1):
        x_label = "edits" if place >= 3 else ""
        axis = add_panel(figure, (2, 3, place), heading, quantity, x_label=x_label, whole=True)
        axis.set_xlim(-0.02 * max(last, 1), 1.03 * max(last, 1))
        draw_panel(axis, quantity, courses)
    _draw_legend(figure.add_subplot(2, 3, 6), courses)
    return figure


def _quantity(courses: Iterable[Course], kind: str, measure: str) -> str:
    """Return the first measure of a kind that was taken at all."""
    taken = {name for course in courses for name in (*course.series, *course.base)}
    wanted = [f"{kind}/{name}" for name in (measure, *MEASURES, "agreement")]
    return next((name for name in wanted if name in taken), wanted[0])


def draw_panel(axis: Axes, quantity: str, courses: Sequence[Course]) -> None:
    """Draw one quantity of every course into a panel; see :func:`draw_comparison`."""
    finite: list[float] = []
    for value in {round(course.base[quantity], 6) for course in courses if quantity in course.base}:
        axis.axhline(value, gid="base", **BASE)
        finite.append(value)
    beyond: list[tuple[int, Line2D]] = []
    for course, style in zip(courses, looks_of(len(courses)), strict=True):
        series = list(course.series.get(quantity, ()))
        starts = series and not quantity.startswith(("efficacy", "generalization"))  # of those nothing is there at 0
        if starts and quantity in course.base and series[0][0] > 0:
            series.insert(0, (0, course.base[quantity]))
        points = [(edits, value if math.isfinite(value) else math.nan) for edits, value in series]
        drawn = zip(*points, strict=True) if points else ((), ())
        [line] = axis.plot(*drawn, gid=course.editor, label=course.label, **style)
        line.set_markevery(_spread(len(points)))
        if len(points) == 1:  # no line shows where to look
            line.set(markersize=11, markeredgecolor=line.get_color())
        seen = [(edits, value) for edits, value in points if math.isfinite(value)]
        finite += [value for _, value in seen]
        beyond += [(edits, line) for edits, value in series if not math.isfinite(value)]
        if seen and seen[-1] == points[-1] and course.is_cut:
            axis.plot(*seen[-1], "x", color=line.get_color(), markersize=11, markeredgewidth=2.6, zorder=9, gid="end")
    _scale(axis, quantity, finite)
    for edits, line in beyond:
        place: Any = {"transform": axis.get_xaxis_transform(), "clip_on": False, "zorder": 9, "gid": "not finite"}
        axis.plot(edits, 1.0, "^", color=line.get_color(), markersize=8, **place)
    if not finite and not beyond:
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color="0.5")


def _spread(count: int, most: int = 12) -> list[int]:
    """Return which points of a line get a marker: all of a few; of many some, the last among them."""
    step = max(1, math.ceil(count / most))
    return list(range(count - 1, -1, -step))


def _scale(axis: Axes, quantity: str, values: Sequence[float]) -> None:
    """Choose an axis on which curves can be told apart, without making much of little."""
    if not values:
        return
    low, high = min(values), max(values)
    if "/" in quantity:  # a share; differences of some hundredths are no mountains
        room = max(0.0, 0.2 - (high - low)) / 2
        low, high = max(0.0, low - room), min(1.0, high + room)
        axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    elif low > 0 and high / low > LOGARITHMIC:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axis.set_yscale("log")
        axis.set_ylim(low / 1.5, high * 1.8)
        subs = (1.0, 2.0, 5.0) if high / low < 1e3 else (1.0,)  # a decade or two have few powers of ten
        axis.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_title(f"{axis.get_title(loc='left')}, logarithmic", fontsize=11, loc="left")
    else:
        high = max(high, low + LEAST_SPAN[quantity] * abs(low))
        axis.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
        axis.ticklabel_format(axis="y", useOffset=False)


def _short(value: float) -> str:
    """Return a tick of a logarithmic axis.

    Example:
        >>> [_short(value) for value in (0.1, 10.0, 1e4, 1e6)]
        ['0.1', '10', '10,000', '1e+06']
    """
    return f"{value:,.0f}" if 1 <= value < 1e5 else f"{value:.3g}"


def _draw_legend(axis: Axes, courses: Sequence[Course]) -> None:
    from matplotlib.lines import Line2D

    axis.set_axis_off()
    axis.set_gid("legend")
    lines = [
        Line2D([], [], label=course.label, **style)
        for course, style in zip(courses, looks_of(len(courses)), strict=True)
    ]
    lines.append(Line2D([], [], label="before the first edit", **BASE))
    cross: Any = {"marker": "x", "linestyle": "", "color": "0.3", "markeredgewidth": 2.2, "markersize": 8}
    if any(course.is_cut for course in courses):
        lines.append(Line2D([], [], label="ends before the stream does", **cross))
    values = [value for course in courses for series in course.series.values() for _, value in series]
    if not all(map(math.isfinite, values)):
        lines.append(Line2D([], [], label="not finite", **cross | {"marker": "^"}))
    columns, size = (1, 11) if len(lines) <= 11 else (2, 10 if len(lines) <= 22 else 8)
    axis.legend(handles=lines, loc="center left", frameon=False, fontsize=size, ncols=columns, handlelength=3)
