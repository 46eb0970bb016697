"""Pictures of a run for its folder: metrics and L1 norms over edits, forgetting by age."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lit_edit.files.pictures import add_panel, new_figure, write_figure
from lit_edit.report.charts import Points
from lit_edit.report.curves import course, growth
from lit_edit.report.edits import edits_of
from lit_edit.report.reading import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWN = (("efficacy", "accuracy"), ("generalization", "success"), ("locality", "agreement"))
"""Which metrics are drawn, by kind and measure."""
_COLOURS = ("tab:blue", "tab:green", "tab:orange")
_OF_STAGES = {"immediate": ("tab:gray", "right after the edit"), "final": ("tab:blue", "at the end")}


@dataclass
class Course:
    """What is drawn of a run: values by number of edits, or by age."""

    metrics: dict[str, Points] = field(default_factory=dict)  # by "kind/measure"
    perplexity: Points = field(default_factory=list)
    growth: dict[str, Points] = field(default_factory=dict)  # of mean |W|, by weight, as a share
    delta: dict[str, Points] = field(default_factory=dict)  # mean |delta W|, by weight
    by_age: dict[str, Points] = field(default_factory=dict)  # probability of the new object, by stage


def draw_course(course: Course) -> dict[str, Figure]:
    """Return the figures that the data allow, by name."""
    figures = {"metrics": _draw_metrics(course), "forgetting": _draw_forgetting(course.by_age)}
    if course.growth:  # an editor may write none
        figures["l1_norms"] = _draw_norms(course)
    return figures


def redraw(run: RunRecord) -> None:
    """Draw a run's pictures again from its folder, where it has some."""
    folder = run.folder / "figures"
    if not folder.is_dir():
        return
    for name, figure in draw_course(course_of(run)).items():
        write_figure(folder / f"{name}.png", figure)


def course_of(run: RunRecord) -> Course:
    """Return what is drawn of a run, from its folder."""
    edits = [edit for edit in edits_of(run) if edit.state not in ("undone", "replaced")]
    by_age: dict[str, Points] = {}
    for stage in _OF_STAGES:
        said = [(len(edits) - n, getattr(edit, stage)) for n, edit in enumerate(edits, 1)]
        by_age[stage] = [(age, s.probability) for age, s in said if s and s.probability is not None]
    weights = growth(run)
    return Course(
        {f"{kind}/{name}": course(run, f"{kind}/{name}") for kind, name in DRAWN},
        course(run, "perplexity"),
        weights,
        {weight: run.logged(f"norm/{weight}/mean_abs_delta") for weight in weights},
        by_age,
    )


def _draw_metrics(course: Course) -> Figure:
    figure = new_figure(10.4, 3.8)
    left = add_panel(figure, (1, 2, 1), "Edits so far", x_label="edits")
    right = add_panel(figure, (1, 2, 2), "Perplexity of ordinary text", x_label="edits")
    for (kind, name), colour in zip(DRAWN, _COLOURS, strict=True):
        if series := course.metrics.get(f"{kind}/{name}"):
            left.plot(*zip(*series, strict=True), marker="o", markersize=3.5, color=colour, label=f"{kind} {name}")
    left.set_ylim(-0.03, 1.03)
    if left.lines:
        left.legend(fontsize=8, loc="lower right")
    if course.perplexity:
        right.plot(*zip(*course.perplexity, strict=True), marker="o", markersize=3.5, color="tab:red")
        right.set_ylim(0, 1.15 * max((y for _, y in course.perplexity if math.isfinite(y)), default=1.0))
    return figure


def _draw_norms(course: Course) -> Figure:
    figure = new_figure(10.4, 3.8)
    left = add_panel(figure, (1, 2, 1), "Growth of mean |W|, %", x_label="edits")
    right = add_panel(figure, (1, 2, 2), "Mean |ΔW|", x_label="edits")
    for weight, points in course.growth.items():
        label = weight.removesuffix(".weight")
        left.plot([x for x, _ in points], [100 * y for _, y in points], label=label)
        right.plot(*zip(*course.delta[weight], strict=True), label=label)
    left.legend(fontsize=6)
    return figure


def _draw_forgetting(by_age: Mapping[str, Points]) -> Figure:
    figure = new_figure(5.2, 3.8)
    axis = add_panel(figure, (1, 1, 1), "Forgetting by age", x_label="age: edits made since")
    for stage, (colour, label) in _OF_STAGES.items():
        if points := by_age.get(stage):
            axis.scatter([x for x, _ in points], [y for _, y in points], s=12, color=colour, label=label, alpha=0.8)
    axis.set(ylabel="probability of the new object", ylim=(-0.03, 1.03))
    if axis.collections:
        axis.legend(fontsize=8)
    return figure
