"""Pictures of a run: metrics over edits, L1 norms over edits, forgetting by age."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, Trainer

from lit_edit.files.pictures import add_panel, new_figure, write_figure
from lit_edit.stream.edit_stream import EditStream

from .base import RunEndCallback
from .layer_norms import LayerNorms
from .retention import Retention

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RunFigures(RunEndCallback):
    """Writes ``figures/*.png`` when a stream ends."""

    def write(self, trainer: Trainer, stream: EditStream, folder: Path) -> None:
        """Draw what the run has recorded."""
        if not len(stream.ledger):
            return
        histories: dict[type[Callback], list[dict[str, Any]]] = {
            type(callback): callback.history
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, (Retention, LayerNorms))
        }
        drawn = draw_all(stream, histories.get(Retention, []), histories.get(LayerNorms, []))
        for name, figure in drawn.items():
            write_figure(folder / "figures" / f"{name}.png", figure)


def draw_all(
    stream: EditStream, retention: Sequence[dict[str, Any]], norms: Sequence[dict[str, Any]]
) -> dict[str, Figure]:
    """Return the figures that the recorded data allow, by name."""
    figures = {"metrics": _draw_metrics(stream, retention), "forgetting": _draw_forgetting(stream)}
    if norms and norms[0]["layers"]:  # an editor may write none
        figures["l1_norms"] = _draw_norms(norms)
    return figures


_LINES = (
    ("efficacy", "accuracy", "tab:blue"),
    ("generalization", "success", "tab:green"),
    ("locality", "agreement", "tab:orange"),
)


def _draw_metrics(stream: EditStream, retention: Sequence[dict[str, Any]]) -> Figure:
    figure = new_figure(10.4, 3.8)
    left = add_panel(figure, (1, 2, 1), "Edits so far", x_label="edits")
    right = add_panel(figure, (1, 2, 2), "Perplexity of ordinary text", x_label="edits")
    done = stream.committed_requests()
    base, final = stream.summary_of("base", done), stream.summary_of("final", done)
    # The last point is the final measurement, over all edits; on the way there retention may have taken samples.
    before = [point for point in retention if point["edits"] < stream.edit_number]
    points = [{"edits": 0, "summary": base}, *before, {"edits": stream.edit_number, "summary": final}]
    for kind, name, colour in _LINES:
        series = [(p["edits"], p["summary"][kind][name]) for p in points if p["summary"][kind].get(name) is not None]
        if series:
            left.plot(*zip(*series, strict=True), marker="o", markersize=3.5, color=colour, label=f"{kind} {name}")
    left.set_ylim(-0.03, 1.03)
    left.legend(fontsize=8, loc="lower right")
    texts = [(p["edits"], p["summary"]["perplexity"]) for p in points if p["summary"].get("perplexity")]
    if texts:
        right.plot(*zip(*texts, strict=True), marker="o", markersize=3.5, color="tab:red")
        right.set_ylim(0, 1.15 * max(y for _, y in texts))
    return figure


def _draw_norms(norms: Sequence[dict[str, Any]]) -> Figure:
    figure = new_figure(10.4, 3.8)
    left = add_panel(figure, (1, 2, 1), "Growth of mean |W|, %", x_label="edits")
    right = add_panel(figure, (1, 2, 2), "Mean |ΔW|", x_label="edits")
    edits = [point["edits"] for point in norms]
    for name in norms[0]["layers"]:
        before = norms[0]["layers"][name]["mean_abs_before"]
        label = name.removesuffix(".weight")
        growth = [100 * (p["layers"][name]["mean_abs_after"] / before - 1) for p in norms]
        left.plot(edits, growth, label=label)
        right.plot(edits, [p["layers"][name]["mean_abs_delta"] for p in norms], label=label)
    left.legend(fontsize=6)
    return figure


def _draw_forgetting(stream: EditStream) -> Figure:
    figure = new_figure(5.2, 3.8)
    axis = add_panel(figure, (1, 1, 1), "Forgetting by age", x_label="age: edits made since")
    total = len(stream.ledger)
    for stage, colour, label in (
        ("immediate", "tab:gray", "right after the edit"),
        ("final", "tab:blue", "at the end"),
    ):
        results = stream.results[stage]
        series = [
            (total - number, math.exp(-results[entry.id].efficacy[0].preferred))
            for number, entry in enumerate(stream.ledger.entries, 1)
            if entry.id in results
        ]
        if series:
            ages, probabilities = zip(*series, strict=True)
            axis.scatter(ages, probabilities, s=12, color=colour, label=label, alpha=0.8)
    axis.set(ylabel="probability of the new object", ylim=(-0.03, 1.03))
    axis.legend(fontsize=8)
    return figure
