"""What a run leaves behind: summary, updates, the list of edits, and what was answered to them."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer

from lit_edit.files.paths import without_nan, write_json
from lit_edit.report.reading import write_notes
from lit_edit.runs.files import write_run_files
from lit_edit.stream.edit_stream import EditStream

from .base import RunEndCallback
from .retention import missed_edits


class RunFolder(RunEndCallback):
    """Writes ``summary.json``, ``run.json`` and, in ``ledger/``, deltas, edits and answers when a stream ends."""

    def write(self, trainer: Trainer, stream: EditStream, folder: Path) -> None:
        """Write the files."""
        write_notes(folder, stream)
        write_run_files(folder, stream.ledger, stream.base_hash, stream.results, missed_edits(trainer))
        write_json(folder / "summary.json", without_nan(stream.summary()))
