"""The table of a sweep: what came of each point, and of all seeds together."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lit_edit.errors import shorten
from lit_edit.files.paths import without_nan, write_text
from lit_edit.runs.files import journal_path
from lit_edit.runs.reading import has_ended
from lit_edit.sweeps.grids import Grid, Point, is_seed
from lit_edit.sweeps.outputs import as_csv, as_markdown, write_outputs

RECORD = "sweep.json"
"""In a point's folder: with which settings it was begun, and how its last process ended."""
LOG = "sweep.log"
"""In a point's folder: what its processes have written."""

METRICS = {  # by column: where summary.json has it
    f"{kind} {name}": ("final", kind, name)
    for kind in ("efficacy", "generalization", "locality")
    for name in ("success", "accuracy")
} | {"agreement": ("final", "locality", "agreement")}
COSTS = ("perplexity change", "largest growth of mean |W|", "seconds per edit")
COLUMNS = ("edits", *METRICS, *COSTS)
_AS_PERCENT = ("perplexity change", "largest growth of mean |W|")


def read_record(folder: Path) -> dict[str, Any]:
    """Return what a sweep has noted in a point's folder; nothing if it has not, or the note is damaged."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def is_done(folder: Path) -> bool:
    """Tell whether a point's run has come to its end, or its process has ended well (``trainer.max_steps``)."""
    return (folder / "summary.json").is_file() and (read_record(folder).get("status") == 0 or has_ended(folder))


def state_of(folder: Path) -> str:
    """Say how far a point is."""
    if is_done(folder):
        return "done"
    record = read_record(folder)
    if status := record.get("status"):
        return f"failed (exit status {status})"
    if record.get("left_out"):
        return "left out"
    return "begun" if journal_path(folder).is_file() else "not run"


def gather(grid: Grid, folder: Path) -> str:
    """Write ``table.md``, ``.csv`` and ``.json`` of a sweep; return the table as Markdown."""
    rows = [row_of(point, folder / point.name) for point in grid.points]
    over = over_seeds(grid, rows)
    text = f"# {grid.name}\n\n{as_markdown(shown(rows, [name for name in rows[0] if name != 'point']))}"
    reasons = [failure_of(row, folder / point.name) for row, point in zip(rows, grid.points, strict=True)]
    left_out = [f"{row['point']}: {reason}" for row, reason in zip(rows, reasons, strict=True)
                if row["state"] == "left out"]  # fmt: skip
    text = with_failures(text, left_out, "Left out")
    if over:
        seeds = ", ".join(axis for axis in grid.axes if is_seed(axis))
        text += f"\nMean and standard deviation over {seeds}:\n\n{as_markdown(_shown_over(over))}"
        write_text(folder / "over_seeds.csv", as_csv(over))
    content = {"sweep": grid.name, "points": rows, "over_seeds": over}
    return write_outputs(folder, "table", text, rows, content=content)


def row_of(
    point: Point, folder: Path, metrics: Mapping[str, tuple[str, str, str]] = MappingProxyType(METRICS)
) -> dict[str, Any]:
    """Return a point's row, ``None`` for what is not there; ``metrics`` are places in ``summary.json`` by column."""
    row: dict[str, Any] = {"index": point.index, "point": point.name, "state": state_of(folder), **point.labels}
    row |= dict.fromkeys(("edits", *metrics, *COSTS))
    if row["state"] != "done":
        return row
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        found = _values(summary, metrics)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return row | {"state": f"summary.json cannot be read ({type(error).__name__})"}
    state = "edits changed since it was measured" if summary.get("stale") else "done"
    return row | without_nan(found) | {"state": state}


def _values(summary: Mapping[str, Any], metrics: Mapping[str, tuple[str, str, str]]) -> dict[str, Any]:
    found: dict[str, Any] = {"edits": summary["edits"]}
    for column, (stage, kind, name) in metrics.items():
        found[column] = summary[stage][kind].get(name)
    before, after = summary["base"]["perplexity"], summary["final"]["perplexity"]
    found["perplexity change"] = after / before - 1 if before and after else None
    growth = [norms["mean_abs_after"] / norms["mean_abs_before"] - 1 for norms in summary["layers"].values()]
    found["largest growth of mean |W|"] = max(growth, default=None)
    found["seconds per edit"] = summary["seconds"]["per_edit"]
    return found


def over_seeds(grid: Grid, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return mean and standard deviation of the points that differ in seeds alone; nothing without such an axis."""
    others = [axis for axis in grid.axes if not is_seed(axis)]
    if len(others) == len(grid.axes):
        return []
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[axis] for axis in others), []).append(row)
    return [_mean_row(dict(zip(others, key, strict=True)), group) for key, group in groups.items()]


def _mean_row(labels: dict[str, Any], group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    done = [row for row in group if row["state"] == "done"]
    row: dict[str, Any] = {**labels, "points": len(group), "done": len(done)}
    for column in COLUMNS[1:]:
        values = [float(other[column]) for other in done if other[column] is not None]
        row[column] = statistics.fmean(values) if values else None
        row[f"{column} sd"] = statistics.stdev(values) if len(values) > 1 else None
    return row


def as_number(column: str, value: Any, signed: bool = True) -> str:
    """Return a cell of a table as it is shown."""
    if value is None or isinstance(value, (str, int)):
        return "–" if value is None else str(value)
    if column in _AS_PERCENT:
        return f"{value:+.1%}" if signed else f"{value:.1%}"
    return f"{value:.2f}" if column == "seconds per edit" else f"{value:.3f}"


def shown(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[dict[str, str]]:
    """Return some columns of a table's rows as they are shown."""
    return [{name: as_number(name, row[name]) for name in names} for row in rows]


def failure_of(row: Mapping[str, Any], run: Path) -> str | None:
    """Return what a failed run has said last, or why one was left out; ``None`` of all others."""
    if row["state"] == "left out":
        return str(read_record(run)["left_out"])
    if not row["state"].startswith("failed"):
        return None
    return last_line(run / LOG) if (run / LOG).is_file() else str(row["state"])


def last_line(log: Path) -> str:
    """Return the last thing that a point's processes have said: the error, if one has named it."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", log.read_text(encoding="utf-8", errors="replace"))]
    errors = [line for line in lines if line.startswith("lit-edit: error:")]
    return shorten((errors or [line for line in lines if line] or ["nothing said"])[-1], 400)


def with_failures(table: str, failures: Sequence[str], heading: str = "Failed") -> str:
    """Return a text with what runs have failed of, or were left out for, below."""
    return f"{table}\n{heading}:\n\n{''.join(f'- {line}' + chr(10) for line in failures)}" if failures else table


def _shown_over(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    shown = []
    for row in rows:
        cells = {name: as_number(name, value) for name, value in row.items() if not name.endswith(" sd")}
        for name in COLUMNS[1:]:
            if row[f"{name} sd"] is not None:
                cells[name] += f" ± {as_number(name, row[f'{name} sd'], signed=False)}"
        shown.append(cells)
    return shown
