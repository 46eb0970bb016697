"""Pictures of a run: metrics over edits, L1 norms over edits, forgetting by age."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from lit_edit.files.pictures import write_figure
from lit_edit.report.pictures import DRAWN, Course, draw_course
from lit_edit.stream.edit_stream import EditStream

from .base import RunEndCallback
from .layer_norms import LayerNorms
from .retention import Retention


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
        course = course_of(stream, histories.get(Retention, []), histories.get(LayerNorms, []))
        for name, figure in draw_course(course).items():
            write_figure(folder / "figures" / f"{name}.png", figure)


def course_of(stream: EditStream, retention: Sequence[dict[str, Any]], norms: Sequence[dict[str, Any]]) -> Course:
    """Return what is drawn, of what callbacks have recorded on the way."""
    done = stream.committed_requests()
    base, final = stream.summary_of("base", done), stream.summary_of("final", done)
    # The last point is the final measurement, over all edits; on the way there retention may have taken samples.
    before = [point for point in retention if point["edits"] < stream.edit_number]
    points = [{"edits": 0, "summary": base}, *before, {"edits": stream.edit_number, "summary": final}]
    course = Course()
    for kind, name in DRAWN:
        found = [(p["edits"], p["summary"][kind].get(name)) for p in points]
        course.metrics[f"{kind}/{name}"] = [(edits, value) for edits, value in found if value is not None]
    texts = [(p["edits"], p["summary"].get("perplexity")) for p in points]
    course.perplexity = [(edits, value) for edits, value in texts if value]
    for name, first in norms[0]["layers"].items() if norms else ():
        of_it = [(point["edits"], point["layers"][name]) for point in norms]
        course.growth[name] = [(edits, p["mean_abs_after"] / first["mean_abs_before"] - 1) for edits, p in of_it]
        course.delta[name] = [(edits, p["mean_abs_delta"]) for edits, p in of_it]
    total = len(stream.ledger)
    for stage in ("immediate", "final"):
        results = stream.results[stage]
        course.by_age[stage] = [
            (total - number, math.exp(-results[entry.id].efficacy[0].preferred))
            for number, entry in enumerate(stream.ledger.entries, 1)
            if entry.id in results
        ]
    return course
