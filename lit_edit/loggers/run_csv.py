"""``metrics.csv`` of a run: one row per number of edits, however often the run is killed and resumed."""

from __future__ import annotations

import csv
import errno
import io
import os
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from lit_edit.files.metric_rows import read_rows
from lit_edit.files.paths import write_atomically


class RunCSVLogger(Logger):
    """Writes ``metrics.csv`` into the run folder: one row per number of committed edits.

    Rows are appended as soon as they are complete. A resumed run takes the file up: what it says of its first step
    joins the row of that step; rows behind it are those of the interrupted attempt and are dropped, and so are lines
    that a crash has damaged. If the run logs its steps again as the first time, the file ends as if it had never
    stopped.

    Args:
        save_dir: The run folder.
    """

    def __init__(self, save_dir: str = "runs/default") -> None:
        super().__init__()
        self._dir = Path(save_dir)
        self._columns: list[str] = []
        self._row: dict[str, Any] = {}
        self._last: int | None = None  # the highest step that this logger has written

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

    log_dir = save_dir

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
        step = int(self._row.get("step", self._last or 0)) if step is None else step
        if self._row and self._row["step"] != step:
            self.save()
        self._row = {**self._row, **{name: float(value) for name, value in metrics.items()}, "step": step}

    @rank_zero_only
    def forget(self, names: Iterable[str], step: int) -> None:
        """Leave values out of the row of a step that an earlier attempt has written there."""
        self.log_metrics({}, step)
        self._row |= dict.fromkeys(names, "")

    @rank_zero_only
    def save(self) -> None:
        """Write the row at hand.

        Raises:
            OSError: If the disk is full or cannot be written; the file is as it was, and the row still at hand.
        """
        if not self._row:
            return
        step = self._row["step"]
        is_next = self._last is not None and step > self._last
        if is_next and self._row.keys() <= set(self._columns) and self.path.is_file():
            self._append()
        else:
            self._rewrite()
        self._last = max(step, self._last or 0)
        self._row = {}

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left."""
        self.save()

    def _append(self) -> None:
        line = _as_text(self._columns, [self._row]).encode()
        with self.path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                if file.write(line) < len(line):  # a disk that is getting full takes a part
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise

    def _rewrite(self) -> None:
        """Write the whole file, with the row at hand in its place."""
        columns, rows = read_rows(self.path)
        step = self._row["step"]
        table: dict[int, dict[str, Any]] = {int(row["step"]): row for row in rows}
        if self._last is None:
            table = {number: row for number, row in table.items() if number <= step}
        # The run may have been cut between two things it says of a step: what was said before stays.
        table[step] = table.get(step, {}) | self._row
        used = {name for row in table.values() for name, value in row.items() if value != ""}
        columns = [name for name in dict.fromkeys(["step", *columns, *self._row]) if name in used]
        text = _as_text(columns, [table[number] for number in sorted(table)], header=True)
        write_atomically(self.path, lambda path: path.write_bytes(text.encode()))
        self._columns = columns


def _as_text(columns: list[str], rows: Iterable[Mapping[str, Any]], header: bool = False) -> str:
    """Return rows as lines; numbers are written such that reading gives them back exactly."""
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
