"""What a run leaves behind: summary, updates, and the list of edits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_edit.export import save_deltas
from lit_edit.metrics.evaluation import EditResult
from lit_edit.paths import without_nan, write_atomically, write_json
from lit_edit.stream import EditStream

from .base import as_stream


class RunFolder(Callback):
    """Writes ``summary.json``, ``ledger/deltas.safetensors`` and ``ledger/edits.jsonl`` when a stream ends.

    Args:
        folder: The run folder; by default the Trainer's ``default_root_dir``.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files."""
        stream = as_stream(pl_module, self)
        summary = stream.finish()
        if not trainer.is_global_zero:
            return
        folder = Path(self.folder or trainer.default_root_dir)
        save_deltas(stream.ledger, folder / "ledger" / "deltas.safetensors", stream.base_hash)
        rows = without_nan(edit_rows(stream))
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        write_atomically(folder / "ledger" / "edits.jsonl", lambda path: path.write_text(text, encoding="utf-8"))
        write_json(folder / "summary.json", without_nan(summary))


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
