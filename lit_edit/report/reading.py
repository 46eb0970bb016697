"""What a run folder says of its run, finished or not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import yaml

from lit_edit.errors import UserError
from lit_edit.files.metric_rows import read_rows
from lit_edit.files.paths import expand, without_nan, write_json
from lit_edit.ledger.history import EditHistory, has_end
from lit_edit.ledger.journal import Journal
from lit_edit.runs.answers import read_answers, write_answers
from lit_edit.runs.files import edit_rows, journal_path
from lit_edit.runs.versions import versions

if TYPE_CHECKING:
    from lit_edit.stream.edit_stream import EditStream

KINDS = ("efficacy", "generalization", "locality")
_OF_AN_EDIT = {"number", "id", "subject", "prompt", "target_new"}
Values = dict[str, float]


class ReportError(UserError):
    """A folder of which no report can be made; the message says why."""


@dataclass
class RunRecord:
    """A run as its folder tells it."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)  # empty if it cannot be read
    config_text: str = ""  # config.yaml as it stands
    summary: dict[str, Any] = field(default_factory=dict)  # of an unfinished run what metrics.csv has of it
    rows: dict[int, Values] = field(default_factory=dict)  # what was logged, by number of edits, which rises
    records: list[dict[str, Any]] = field(default_factory=list)  # of the journal
    edits: list[dict[str, Any]] = field(default_factory=list)  # as in ledger/edits.jsonl, one per edit ever made
    answers: dict[int, dict[str, Any]] = field(default_factory=dict)  # as in ledger/answers.jsonl, by number
    history: EditHistory = field(default_factory=EditHistory)  # what the records add up to
    notes: dict[str, Any] = field(default_factory=dict)  # versions, and how many edits were asked for
    ended: bool = False
    times: dict[int, str] = field(default_factory=dict)  # when an edit was made, by number

    @property
    def name(self) -> str:
        """The folder's."""
        return self.folder.resolve().name

    def setting(self, path: str) -> Any:
        """Return a setting by its dotted name, or ``None``."""
        return look_up(self.config, *path.split("."))

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The names of all that was logged, in the order in which they came."""
        return tuple(dict.fromkeys(name for values in self.rows.values() for name in values))

    def logged(self, name: str) -> list[tuple[float, float]]:
        """Return what was logged under a name, with the number of edits at each value."""
        return [(edits, values[name]) for edits, values in self.rows.items() if name in values]


def look_up(tree: Any, *path: str) -> Any:
    """Return what stands at a place of nested mappings, or ``None``."""
    for part in path:
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def mean_of(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that there are; ``None`` without any."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def write_notes(folder: Path, stream: EditStream) -> None:
    """Write what a report needs besides: how many edits a run was asked for, its versions, and what was answered."""
    asked = len(stream.stream_requests())
    write_json(folder / "run.json", {"asked": asked, "device": str(stream.device), "versions": versions()})
    write_answers(folder, stream.ledger.history, stream.results, stream.tokenizer)


def read_run(folder: Path) -> RunRecord:
    """Read a run folder, without opening a model or changing a file.

    Raises:
        ReportError: If there is no run.
    """
    folder = expand(folder)
    if not folder.is_dir():
        raise ReportError(f"there is no run folder {folder}: give one that lit-edit fit has made, for example runs/x")
    if not any(path.is_file() for path in (folder / "summary.json", folder / "metrics.csv", journal_path(folder))):
        raise ReportError(
            f"{folder} is no run folder: it has none of summary.json, metrics.csv and ledger/journal; give one that "
            "lit-edit fit has made, for example runs/x"
        )
    record = RunRecord(folder)
    record.config_text, record.config = _read_config(folder / "config.yaml")
    logged = ((int(row.pop("step")), row) for row in read_rows(folder / "metrics.csv")[1])
    found = {edits: {name: float(cell) for name, cell in row.items() if cell} for edits, row in logged}
    record.rows = dict(sorted(found.items()))
    record.notes = _read_json(folder / "run.json")
    _read_edits(record)
    record.summary = _read_json(folder / "summary.json") or _summary_of(record)
    return record


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return "", {}
    return text, config if isinstance(config, dict) else {}


def _read_edits(record: RunRecord) -> None:
    """Join the journal, the list of edits and the answers."""
    folder = record.folder
    listed = _read_lines(folder / "ledger" / "edits.jsonl")
    if journal_path(folder).is_file():
        record.records = Journal(journal_path(folder), writable=False).records
        record.history = EditHistory.of(record.records)
        asked, handled = record.notes.get("asked"), len(record.history.handled)
        record.ended = has_end(record.records)
        record.ended = record.ended or (isinstance(asked, int) and handled >= asked)
        record.times = {e["number"]: r["time"] for r in record.records if "time" in r for e in r.get("entries", ())}
        known = {(row["number"], row["id"]): row for row in listed}
        rows: list[dict[str, Any]] = without_nan(edit_rows(record.history, {}))
        record.edits = [{**known.get((row["number"], row["id"]), {}), **row} for row in rows]
    else:
        record.edits, record.ended = listed, (folder / "summary.json").is_file()
    names = {row["number"]: row["id"] for row in record.edits}
    record.answers = {row["number"]: row for row in read_answers(folder) if names.get(row["number"]) == row["id"]}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        whole = [row for row in rows if row.keys() >= _OF_AN_EDIT and row["number"] and row["id"]]
        return [{"status": "holds", **row} for row in whole]
    except (OSError, ValueError, AttributeError):
        return []


def _summary_of(record: RunRecord) -> dict[str, Any]:
    """Return what the log has of an unfinished run, in the shape of ``summary.json``."""
    summary: dict[str, Any] = {"edits": sum(row["status"] == "holds" for row in record.edits), "unfinished": True}
    for edits, values in record.rows.items():
        if (base := _unflatten(values, "base")) and "base" not in summary:
            summary["base"] = base
        for stage in ("retention", "final"):
            if found := _unflatten(values, stage):
                summary |= {"final": found, "final_at": edits}
    means = {name: mean_of(y for _, y in record.logged(name) if math.isfinite(y)) for name in record.columns}
    if immediate := _unflatten(means, "immediate"):
        summary["immediate"] = immediate
    if "time/edit" in means:
        summary["seconds"] = {"per_edit": means["time/edit"]}
    if layers := _layers_of(record):
        summary["layers"] = layers
    cleaned: dict[str, Any] = without_nan(summary)
    return cleaned


def _unflatten(values: Mapping[str, float | None], stage: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        first, *path = name.split("/")
        if first == stage and path:
            place = found
            for part in path[:-1]:
                place = place.setdefault(part, {})
            place[path[-1]] = value
    return found


def _layers_of(record: RunRecord) -> dict[str, Values]:
    layers: dict[str, Values] = {}
    for name in record.columns:
        if name.startswith("norm/"):
            layer, _, what = name.removeprefix("norm/").rpartition("/")
            values = [value for _, value in record.logged(name)]
            ends = {"mean_abs_before": values[0], "mean_abs_after": values[-1]}
            layers.setdefault(layer, {}).update(ends if what == "mean_abs_w" else {what: values[-1]})
    return layers
