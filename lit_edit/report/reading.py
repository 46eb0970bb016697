"""What a run folder says of its run, finished or not."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lit_edit.errors import UserError
from lit_edit.files.metric_rows import read_rows
from lit_edit.files.paths import without_nan, write_json
from lit_edit.ledger.history import EditHistory
from lit_edit.ledger.journal import Journal
from lit_edit.runs.answers import read_answers, write_answers
from lit_edit.runs.files import edit_rows, journal_path
from lit_edit.runs.versions import versions

if TYPE_CHECKING:
    from lit_edit.stream.edit_stream import EditStream

KINDS = ("efficacy", "generalization", "locality")
Values = dict[str, float]


class ReportError(UserError):
    """A folder of which no report can be made; the message says why."""


@dataclass
class RunRecord:
    """A run as its folder tells it.

    Attributes:
        folder: Where it is.
        config: Its settings; empty if they cannot be read.
        config_text: ``config.yaml`` as it stands.
        summary: As ``summary.json``; of an unfinished run what ``metrics.csv`` has of it.
        rows: By number of edits: what was logged.
        edits: As in ``ledger/edits.jsonl``, one per edit ever made.
        answers: By number of the edit: its prompts and what was said to them.
        refused: Id and reason of edits that were not made.
        notes: Versions, and how many edits were asked for.
        handled: Edits of the stream that were made or refused.
        ended: Whether it has come to its end; ``None`` if nothing tells.
        times: By number: when an edit was made.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    rows: dict[int, Values] = field(default_factory=dict)
    edits: list[dict[str, Any]] = field(default_factory=list)
    answers: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    refused: list[tuple[str, str]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    handled: int = 0
    ended: bool | None = None
    times: dict[int, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The folder's."""
        return self.folder.resolve().name

    def setting(self, path: str) -> Any:
        """Return a setting by its dotted name, or ``None``."""
        return look_up(self.config, *path.split("."))


def look_up(tree: Any, *path: str) -> Any:
    """Return what stands at a place of nested mappings, or ``None``."""
    for part in path:
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def write_notes(folder: Path, stream: EditStream) -> None:
    """Write ``run.json``: with which versions a run was made, and how many edits it was asked for."""
    asked = len(stream.stream_requests())
    write_json(folder / "run.json", {"asked": asked, "device": str(stream.device), "versions": versions()})


def write_unfinished(folder: Path, stream: EditStream) -> None:
    """Write what a report needs of a run that is cut short, as far as it was measured."""
    write_notes(folder, stream)
    write_answers(folder, stream.ledger.history, stream.results, stream.tokenizer)


def read_run(folder: Path) -> RunRecord:
    """Read a run folder, without opening a model or changing a file.

    Raises:
        ReportError: If there is no run.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise ReportError(f"there is no run folder {folder}: give one that lit-edit fit has made, for example runs/x")
    if not any(path.is_file() for path in (folder / "summary.json", folder / "metrics.csv", journal_path(folder))):
        raise ReportError(
            f"{folder} is no run folder: it has none of summary.json, metrics.csv and ledger/journal; give one that "
            "lit-edit fit has made, for example runs/x"
        )
    record = RunRecord(folder)
    record.config_text, record.config = _read_config(folder / "config.yaml")
    record.rows = _read_metrics(folder / "metrics.csv")
    record.notes = _read_json(folder / "run.json")
    _read_edits(record)
    record.summary = _read_json(folder / "summary.json") or _summary_of(record)
    if record.ended is None and (folder / "summary.json").is_file():
        record.ended = True
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


def _read_metrics(path: Path) -> dict[int, Values]:
    _, rows = read_rows(path)
    return {
        int(row["step"]): {name: float(cell) for name, cell in row.items() if cell and name != "step"} for row in rows
    }


def _read_edits(record: RunRecord) -> None:
    """Join the journal, the list of edits and the answers."""
    folder, history = record.folder, None
    if journal_path(folder).is_file():
        records = Journal(journal_path(folder), writable=False).records
        history = EditHistory.of(records)
        record.refused, record.handled = list(history.refused), len(history.handled)
        record.ended = any(entry["kind"] == "end" for entry in records)
        record.times = {e["number"]: r["time"] for r in records if "time" in r for e in r.get("entries", ())}
        asked = record.notes.get("asked")
        record.ended = record.ended or (isinstance(asked, int) and record.handled >= asked)
    listed = _read_lines(folder / "ledger" / "edits.jsonl")
    record.edits = listed if history is None else without_nan(edit_rows(history, {}))
    if history is not None:
        known = {(row["number"], row["id"]): row for row in listed}
        for row in record.edits:
            row |= {k: v for k, v in known.get((row["number"], row["id"]), {}).items() if k not in row}
    names = {row["number"]: row["id"] for row in record.edits}
    for answer in read_answers(folder):
        if names.get(answer["number"]) == answer["id"]:
            record.answers[answer["number"]] = answer["prompts"]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return [row for row in rows if row["number"] and row["id"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _summary_of(record: RunRecord) -> dict[str, Any]:
    """Return what the log has of an unfinished run, in the shape of ``summary.json``."""
    summary: dict[str, Any] = {"edits": sum(row["status"] == "holds" for row in record.edits), "unfinished": True}
    for edits, values in sorted(record.rows.items()):
        if (base := _unflatten(values, "base")) and "base" not in summary:
            summary["base"] = base
        for stage in ("retention", "final"):
            if found := _unflatten(values, stage):
                summary |= {"final": found, "final_at": edits}
    immediate: dict[str, list[float]] = {}
    seconds = []
    for values in record.rows.values():
        for name, value in values.items():
            if name.startswith("immediate/") and math.isfinite(value):
                immediate.setdefault(name, []).append(value)
        seconds += [values["time/edit"]] if "time/edit" in values else []
    if immediate:
        summary["immediate"] = _unflatten({k: sum(v) / len(v) for k, v in immediate.items()}, "immediate")
    if seconds:
        summary["seconds"] = {"per_edit": sum(seconds) / len(seconds)}
    if layers := _layers_of(record.rows):
        summary["layers"] = layers
    cleaned: dict[str, Any] = without_nan(summary)
    return cleaned


def _unflatten(values: Values, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        first, *rest = name.split("/")
        if first != stage or not rest:
            continue
        place = found
        for part in rest[:-1]:
            place = place.setdefault(part, {})
        place[rest[-1]] = value
    return found


def _layers_of(rows: Mapping[int, Values]) -> dict[str, Values]:
    layers: dict[str, Values] = {}
    for _, values in sorted(rows.items()):
        for name, value in values.items():
            if not name.startswith("norm/"):
                continue
            layer, _, what = name.removeprefix("norm/").rpartition("/")
            norms = layers.setdefault(layer, {})
            if what == "mean_abs_w":
                norms.setdefault("mean_abs_before", value)
                norms["mean_abs_after"] = value
            else:
                norms[what] = value
    return layers
