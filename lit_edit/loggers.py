"""Loggers that know what a run folder is."""

from __future__ import annotations

import csv
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from lit_edit.paths import write_atomically


class RunCSVLogger(Logger):
    """Writes ``metrics.csv`` into the run folder: one row per number of committed edits.

    Rows are appended as soon as they are complete. A resumed run takes the file up: rows from its first step on are
    those of the interrupted attempt and are replaced.

    Args:
        save_dir: The run folder.
    """

    def __init__(self, save_dir: str = "runs/default") -> None:
        super().__init__()
        self._dir = Path(save_dir)
        self._columns: list[str] = ["step"]
        self._row: dict[str, Any] = {}
        self._written: dict[str, Any] = {}
        self._started = False

    @property
    def name(self) -> str:
        """Name of the run."""
        return self._dir.name

    @property
    def version(self) -> str:
        """Nothing: a run folder holds one run."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self._dir)

    @property
    def log_dir(self) -> str:
        """The run folder."""
        return str(self._dir)

    @property
    def path(self) -> Path:
        """The file."""
        return self._dir / "metrics.csv"

    @property
    @rank_zero_experiment
    def experiment(self) -> RunCSVLogger:
        """The logger itself."""
        return self

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: ``config.yaml`` holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add values to the row of a step."""
        step = int(self._row.get("step", 0)) if step is None else step
        if self._row and self._row["step"] != step:
            self.save()
        self._row = {**self._row, **{name: float(value) for name, value in metrics.items()}, "step": step}

    @rank_zero_only
    def save(self) -> None:
        """Write the row at hand."""
        if not self._row:
            return
        row, self._row = self._row, {}
        kept = None if self._started else self._earlier_rows(row["step"])
        if self._written.get("step") == row["step"]:  # more about the same step, after a save
            row, kept = {**self._written, **row}, self._read()[:-1]
        self._written = row
        self._started = True
        new = [name for name in row if name not in self._columns]
        if kept is not None or new or not self.path.is_file():
            rows = [*(self._read() if kept is None else kept), row]
            self._columns += new
            write_atomically(self.path, lambda path: self._write(path, rows))
            return
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)
            file.flush()
            os.fsync(file.fileno())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left."""
        self.save()

    def _earlier_rows(self, step: int) -> list[dict[str, Any]]:
        rows = [row for row in self._read() if row["step"].isdigit() and int(row["step"]) < step]
        self._columns = list(rows[0]) if rows else ["step"]
        return rows

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def _write(self, path: Path, rows: list[dict[str, Any]]) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
