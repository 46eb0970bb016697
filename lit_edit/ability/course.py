"""General ability along a stream: what is logged of it, and how it has changed since the unedited model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_edit.ability.measure import Record


def ability_metrics(records: dict[str, Record]) -> dict[str, float]:
    """Return the metrics of a measurement by the names under which they are logged, without their intervals."""
    metrics: dict[str, float] = {}
    for task, record in records.items():
        for way, prefix in (("likelihood", ""), ("generation", "generated_")):
            for name in ("accuracy", "f1", "mcc") if way in record else ():
                metrics[f"ability/{task}/{prefix}{name}"] = record[way][name]
        if "generation" in record:
            metrics[f"ability/{task}/unparsable"] = record["generation"]["unparsable"]
    return metrics


def summarise_ability(history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what stands in ``summary.json``: first and last measurement, the change, and the points between."""
    from lit_edit.ability.measure import compare_records  # torch: the report reads what this has written, without it

    first, last = history[0], history[-1]
    return {
        "edits": last["edits"],
        "base": _without_answers(first["tasks"]),
        "final": _without_answers(last["tasks"]),
        "points": [{"edits": point["edits"], **ability_metrics(point["tasks"])} for point in history],
        "change": {name: compare_records(first["tasks"][name], record) for name, record in last["tasks"].items()},
    }


def _without_answers(records: dict[str, Record]) -> dict[str, Record]:
    return {task: {k: v for k, v in record.items() if k != "answers"} for task, record in records.items()}


def mean_accuracy(summary: Mapping[str, Any], stage: str) -> float | None:
    """Return the mean accuracy over a summary's tasks, by the likeliest option; ``None`` if none was measured.

    Example:
        >>> tasks = {"a": {"likelihood": {"accuracy": 0.5}}, "b": {"likelihood": {"accuracy": 1.0}}}
        >>> mean_accuracy({"ability": {"final": tasks}}, "final"), mean_accuracy({}, "final")
        (0.75, None)
    """
    place: Any = summary
    for name in ("ability", stage):
        place = place.get(name) if isinstance(place, Mapping) else None
    tasks = place.values() if isinstance(place, Mapping) else ()
    found = [task.get("likelihood") for task in tasks if isinstance(task, Mapping)]
    values = [scores.get("accuracy") for scores in found if isinstance(scores, Mapping)]
    known = [value for value in values if isinstance(value, (int, float))]
    return sum(known) / len(known) if known else None
