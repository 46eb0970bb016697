"""The field's figures: heat maps of one fact, and average indirect effects by layer and token role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lit_edit.files.pictures import add_panel, new_figure
from lit_edit.studies.tracing.prompts import ROLES
from lit_edit.studies.tracing.summary import AverageEffect
from lit_edit.studies.tracing.trace import FactTrace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES: Mapping[str, str] = {"hidden": "single hidden state", "mlp": "MLP outputs", "attn": "attention outputs"}
MAPS: Mapping[str, str] = {"hidden": "Purples", "mlp": "Greens", "attn": "Reds"}

# Okabe and Ito's colours, which are told apart with any kind of colour vision.
COLOURS = ("#56B4E9", "#999999", "#D55E00", "#E69F00", "#009E73", "#0072B2")
STYLES: tuple[Any, ...] = ("--", ":", "-", (0, (5, 1, 1, 1)), ":", "-")


def draw_fact(trace: FactTrace, window: int = 10) -> Figure:
    """Draw one fact: the answer's probability by restored token and layer, a panel per kind.

    Tokens of the subject are marked with a star. The palest colour is the corrupted probability. The window of layers
    that were restored together is for the titles.
    """
    first, behind = trace.subject
    tokens = [token.replace("$", r"\$").replace("\n", " ") for token in trace.tokens]  # "$" would begin a formula
    labels = [f"{token.strip() or repr(token)}{'*' if first <= i < behind else ''}" for i, token in enumerate(tokens)]
    known = f"clean {trace.p_clean:.3f}, corrupted {trace.p_corrupt:.3f}"
    title = f"{' '.join(trace.prompt.splitlines())} …  ({known})"
    figure = new_figure(1.2 + 3.9 * len(trace.restored), 1.5 + 0.24 * len(labels), title)
    for place, (kind, layers) in enumerate(trace.restored.items(), 1):
        axis = figure.add_subplot(1, len(trace.restored), place, gid=kind)
        values = [[trace.p_corrupt] * len(layers)] * first  # nothing is corrupted before the subject
        values += [list(column) for column in zip(*layers, strict=True)]
        _draw_map(axis, kind, window, values, trace.p_corrupt, labels, f"p({trace.answer.strip()})")
        axis.set_xlabel("layer", fontsize=9)
    return figure


def draw_averages(averages: Sequence[AverageEffect], window: int = 10, title: str = "") -> Figure:
    """Draw average indirect effects: above heat maps of token role by layer, below curves with 95 % intervals."""
    kinds = list(dict.fromkeys(average.kind for average in averages))
    figure = new_figure(2.0 + 4.2 * len(kinds), 6.8, title)
    curves: Axes | None = None
    for place, kind in enumerate(kinds, 1):
        rows = {role: [a for a in averages if a.kind == kind and a.role == role] for role in ROLES}
        rows = {role: found for role, found in rows.items() if found}
        axis = figure.add_subplot(2, len(kinds), place, gid=f"{kind} map")
        _draw_map(axis, kind, window, [[a.effect for a in found] for found in rows.values()], 0.0, list(rows), "AIE")
        below = add_panel(figure, (2, len(kinds), len(kinds) + place), name=f"{kind} curves", x_label="layer")
        if curves is None:
            below.set_ylabel("average indirect effect")
        else:
            below.sharey(curves)
        curves = below
        _draw_curves(below, rows)
    if curves is not None:
        figure.legend(
            *curves.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=9, frameon=False
        )
    return figure


def _draw_curves(axis: Axes, rows: Mapping[str, Sequence[AverageEffect]]) -> None:
    axis.axhline(0, color="0.6", linewidth=0.8)
    for role, found in rows.items():
        index = ROLES.index(role)
        layers, effects = [a.layer for a in found], [a.effect for a in found]
        bold = role in ("last subject token", "last token")
        look: Any = {"color": COLOURS[index], "linestyle": STYLES[index], "linewidth": 2.2 if bold else 1.3}
        axis.plot(layers, effects, label=role, gid=role, zorder=3 if bold else 2, **look)
        low = [a.effect - 1.96 * a.error for a in found]
        high = [a.effect + 1.96 * a.error for a in found]
        axis.fill_between(layers, low, high, color=COLOURS[index], alpha=0.15, linewidth=0)


def _draw_map(
    axis: Axes, kind: str, window: int, values: Sequence[Sequence[float]], low: float, labels: Sequence[str], what: str
) -> None:
    """Draw values by row and layer, the palest colour for ``low``; rows are named in the first panel."""
    most = max(max(map(max, values)), low + 1e-6)
    image = axis.imshow(values, MAPS[kind], aspect="auto", vmin=low, vmax=most, interpolation="nearest")
    heading = f"restoring {TITLES[kind]}"
    axis.set_title(heading if kind == "hidden" else f"{heading}, window of {window}", fontsize=9)
    is_first = axis is axis.figure.axes[0]
    axis.set_yticks(range(len(values)), labels if is_first else [""] * len(values), fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.figure.colorbar(image, ax=axis).ax.set_title(what, fontsize=8)
