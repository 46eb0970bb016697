"""What a run's folder holds about its edits, and who may write there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from lit_edit.errors import UserError
from lit_edit.files.paths import read_json_lines, without_nan, write_json, write_json_lines

if TYPE_CHECKING:
    from lit_edit.ledger.edit_ledger import EditLedger
    from lit_edit.ledger.history import EditHistory
    from lit_edit.metrics.evaluation import EditResult, Summary

    Results = Mapping[str, Mapping[str, EditResult]]
    """By stage and id."""


class RunLockedError(UserError):
    """Another process works in the run folder."""


def journal_path(folder: Path) -> Path:
    """Return where a run keeps its journal."""
    return folder / "ledger" / "journal"


def deltas_path(folder: Path) -> Path:
    """Return where a run keeps what was added to the weights."""
    return folder / "ledger" / "deltas.safetensors"


@contextmanager
def run_lock(folder: Path, other: str = "--run_name") -> Iterator[None]:
    """Keep other processes out of a run folder; the system lifts the lock when a process dies, however it dies.

    ``other`` is the option that names another folder, for the message of :class:`RunLockedError`.
    """
    lock = FileLock(folder / ".lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise RunLockedError(
            f"another process is working in {folder}; wait for its end, or choose another {other}"
        ) from None
    except OSError as error:
        raise RunLockedError(f"{folder} cannot be written: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def write_run_files(
    folder: Path, ledger: EditLedger, base_hash: str, results: Results, missed: Mapping[str, int] | None = None
) -> None:
    """Write ``ledger/edits.jsonl`` and ``ledger/deltas.safetensors``: what the journal adds up to.

    ``results`` and ``missed`` are as for :func:`edit_rows`.
    """
    from lit_edit.export.model import save_deltas

    rows = without_nan(edit_rows(ledger.history, results, missed))
    kept = _earlier_rows(folder / "ledger" / "edits.jsonl")
    for row in rows:  # what was measured at the edit stays true; the end is another one now
        old = kept.get(row["number"], {})
        if old.get("id") == row["id"]:
            row |= {k: v for k, v in old.items() if k.startswith(("base_", "immediate_", "missed_")) and k not in row}
    write_json_lines(folder / "ledger" / "edits.jsonl", rows)
    save_deltas(ledger, deltas_path(folder), base_hash)  # last: it says up to where the files have come


def _earlier_rows(path: Path) -> dict[int, dict[str, Any]]:
    """Return the rows that a run's list of edits holds so far, by number; none if it cannot be read."""
    try:
        return {row["number"]: row for row in read_json_lines(path)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def current_rows(folder: Path, history: EditHistory) -> list[dict[str, Any]]:
    """Return :func:`edit_rows` with the marks of a run's files; those of the end only if its edits are as they were."""
    rows, kept = without_nan(edit_rows(history, {})), _earlier_rows(folder / "ledger" / "edits.jsonl")
    same = [(r["number"], r["status"]) for r in rows] == [(n, r.get("status")) for n, r in kept.items()]
    for row in rows:
        old = kept.get(row["number"], {})
        if old.get("id") == row["id"]:
            row |= {k: v for k, v in old.items() if k not in row and (same or not k.startswith("final_"))}
    return rows


def edit_rows(history: EditHistory, results: Results, missed: Mapping[str, int] | None = None) -> list[dict[str, Any]]:
    """Return one row per edit ever made: what was written, whether it is in the model, how sure it is, and its marks.

    ``missed`` gives ``missed_since``: after how many edits one was found not to hold, of those that held before.
    """
    rows = []
    for entry in history.made:
        undone = history.undone.get(entry.number)
        row: dict[str, Any] = {"number": entry.number, "status": "holds" if undone is None else undone}
        row |= entry.as_dict()
        for stage, found in results.items():
            if entry.id in found and (undone is None or stage != "final"):
                row |= {f"{stage}_{name}": value for name, value in _marks(found[entry.id]).items()}
        if missed and entry.id in missed:
            row["missed_since"] = missed[entry.id]
        rows.append(row)
    return rows


def _marks(result: EditResult) -> dict[str, Any]:
    probe = result.efficacy[0]
    return {
        "success": None if probe.other is None else probe.preferred < probe.other,
        "accuracy": all(probe.hits),
        "target_nll": probe.preferred,
    }


OF_THE_END = ("ability", "age_curves", "me_perplexity", "protocol", "published")
"""What callbacks have measured of the model at the end, or along the stream to it."""


def update_summary(folder: Path, ledger: EditLedger, final: Summary | None) -> None:
    """Bring ``summary.json`` up to edits that were taken out or put back after the end.

    What callbacks had measured is of the model as it was at the end, and is not measured again: it is moved to
    ``before_change``. ``final`` are the metrics over the edits that hold; ``None`` if they were not measured.
    """
    path = folder / "summary.json"
    if not path.is_file():
        return
    summary = json.loads(path.read_text(encoding="utf-8"))
    summary |= {"edits": len(ledger), "undone": len(ledger.history.undone), "layers": ledger.layer_norms()}
    if moved := {name: summary.pop(name) for name in OF_THE_END if name in summary}:
        summary["before_change"] = moved
    if final is None:
        summary["stale"] = "edits were taken out or put back since; final and perplexity are of the model before"
    else:
        summary["final"] = final
        summary.pop("stale", None)
    write_json(path, without_nan(summary))
