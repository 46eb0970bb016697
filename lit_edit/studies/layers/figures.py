"""The figure of a search: single layers as lines, groups and the held-out comparison as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lit_edit.files.pictures import add_panel, new_figure
from lit_edit.studies.layers.candidates import Layers
from lit_edit.studies.layers.trial import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which are told apart with any kind of colour vision.
LINES: Mapping[str, tuple[str, str]] = {
    "score": ("#000000", "-"),
    "efficacy": ("#0072B2", "--"),
    "generalization": ("#009E73", "-."),
    "locality": ("#D55E00", ":"),
}


def thorough(trials: Sequence[Trial]) -> list[Trial]:
    """Return of each layer, or group of layers, the trial over most edits; in the order of the layers."""
    most: dict[Layers, Trial] = {}
    for trial in trials:
        if trial.layers not in most or trial.edits > most[trial.layers].edits:
            most[trial.layers] = trial
    return [most[layers] for layers in sorted(most)]


def draw_search(trials: Sequence[Trial], default: Layers, title: str = "") -> Figure:
    """Draw all trials of a search; ``default`` are the layers that the method takes by itself."""
    searched = [trial for trial in trials if trial.stage != "held out"]
    singles = [trial for trial in thorough(searched) if len(trial.layers) == 1]
    groups = [t for t in thorough(searched) if len(t.layers) > 1 or t.layers == default]
    held_out = [trial for trial in trials if trial.stage == "held out"]
    rows = max(3, len(groups) + len(held_out) + 2)
    figure = new_figure(12.0, 1.6 + 0.32 * max(9, rows), title)
    heading = "One layer (hollow: over fewer edits)"
    _draw_singles(add_panel(figure, (1, 2, 1), heading, "singles", x_label="layer", whole=True), singles)
    heading = "Score of groups (pale: over fewer edits), and held out"
    _draw_bars(add_panel(figure, (1, 2, 2), heading, "groups", grid=False), groups, held_out, default)
    return figure


def _draw_singles(axis: Axes, trials: Sequence[Trial]) -> None:
    axis.set_ylim(-0.03, 1.03)
    most = max((trial.edits for trial in trials), default=0)
    for name, (colour, style) in LINES.items():
        points = [(t.layers[0], getattr(t, name), t.edits == most) for t in trials if getattr(t, name) is not None]
        # Scores over different numbers of edits are no line.
        xs, ys = [x for x, _, whole in points if whole], [y for _, y, whole in points if whole]
        axis.plot(xs, ys, style, color=colour, label=name, linewidth=2 if name == "score" else 1.3)
        for x, y, whole in points:
            axis.scatter(x, y, s=26, zorder=3, edgecolors=colour, facecolors=colour if whole else "white")
    axis.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=len(LINES))


def _draw_bars(axis: Axes, groups: Sequence[Trial], held_out: Sequence[Trial], default: Layers) -> None:
    most = max((trial.edits for trial in groups), default=0)
    trials = [*groups, *held_out]
    apart = [trial.stage == "held out" for trial in trials]
    names = [
        f"{'held out: ' if alone else ''}{trial.name}{' (default)' if trial.layers == default else ''}"
        for trial, alone in zip(trials, apart, strict=True)
    ]
    places = [number + 0.6 * (number >= len(groups)) for number in range(len(trials))]
    colours = ["#E69F00" if alone else "#56B4E9" for alone in apart]
    bars = axis.barh(places, [trial.score or 0.0 for trial in trials], color=colours, height=0.7)
    for bar, trial, alone in zip(bars, trials, apart, strict=True):
        bar.set_alpha(1.0 if alone or trial.edits == most else 0.4)
    axis.bar_label(bars, fmt="%.3f", padding=3, fontsize=9)
    axis.set_yticks(places, names, fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.12)
    axis.set_xlabel("score")
