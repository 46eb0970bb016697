"""What a run leaves behind: summary, updates, and the list of edits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lit_edit.export import save_deltas
from lit_edit.metrics.evaluation import EditResult
from lit_edit.paths import without_nan, write_atomically, write_json
from lit_edit.stream import EditStream

from .base import RunEndCallback


class RunFolder(RunEndCallback):
    """Writes ``summary.json``, ``ledger/deltas.safetensors`` and ``ledger/edits.jsonl`` when a stream ends.

    Args:
        folder: The run folder; by default the Trainer's ``default_root_dir``.
    """

    def write(self, trainer: Trainer, stream: EditStream, folder: Path) -> None:
        """Write the files."""
        save_deltas(stream.ledger, folder / "ledger" / "deltas.safetensors", stream.base_hash)
        rows = without_nan(edit_rows(stream))
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        write_atomically(folder / "ledger" / "edits.jsonl", lambda path: path.write_text(text, encoding="utf-8"))
        write_json(folder / "summary.json", without_nan(stream.summary()))


def edit_rows(stream: EditStream) -> list[dict[str, Any]]:
    """Return one row per committed edit: what was written, how sure the target is, and whether it is there."""
    rows = []
    for number, entry in enumerate(stream.ledger.entries, 1):
        row: dict[str, Any] = {"number": number, **entry.as_dict()}
        for stage, results in stream.results.items():
            if entry.id in results:
                row |= {f"{stage}_{name}": value for name, value in _marks(results[entry.id]).items()}
        rows.append(row)
    return rows


def _marks(result: EditResult) -> dict[str, Any]:
    probe = result.efficacy[0]
    return {
        "success": None if probe.other is None else probe.preferred < probe.other,
        "accuracy": all(probe.hits),
        "target_nll": probe.preferred,
    }
