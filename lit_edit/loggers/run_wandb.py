"""The wandb run of a run folder: one, however often the run is killed and resumed."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from lit_edit.files.metric_rows import read_rows
from lit_edit.files.paths import write_text

log = logging.getLogger(__name__)


class RunWandbLogger(WandbLogger):
    """Lightning's logger for Weights & Biases, with one wandb run per run folder and one row per number of edits.

    The wandb run's id is made once and kept in ``wandb/run_id``. A resumed run that is offline begins a new offline
    folder; it is given all earlier rows, from the ``metrics.csv`` that :class:`lit_edit.loggers.RunCSVLogger` writes,
    and so holds the whole run. Folders of earlier attempts go to ``wandb/interrupted/``. A resumed run that is online
    goes on with the server's and sends only rows that the server does not have; no test covers that, for want of a
    server.

    Args:
        save_dir: The run folder.
        name: Name of the wandb run; by default that of the folder.
        **kwargs: As for Lightning's logger: ``project``, ``group``, ``entity``, ``tags`` and so on.
    """

    def __init__(self, save_dir: str = "runs/default", name: str | None = None, **kwargs: Any) -> None:
        super().__init__(name=name or Path(save_dir).resolve().name, save_dir=save_dir, **kwargs)
        self._wandb_init["resume"] = self._wandb_init["resume"] or "allow"  # the command line passes None
        self._folder = Path(save_dir)
        self._begun = False  # the wandb run is ours, not one that was there before
        self._resumed = False
        self._caught_up = False
        self._known = 0  # steps below are on the server
        self._step = 0  # of the row at hand

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The wandb run, begun or taken up when it is first asked for."""
        import wandb

        if self._experiment is None and not self._begun and wandb.run is None:
            self._begin()
        return super().experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add values to the row of a step, or without one to the row at hand."""
        self._catch_up(step)
        self._send(metrics, self._step if step is None else step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Complete the run if it was resumed and had nothing to log."""
        if self._experiment is not None:
            self._catch_up(None)
        super().finalize(status)

    def _begin(self) -> None:
        """Find the id of the folder's wandb run, or make one, and set aside what this attempt makes anew."""
        folder = self._folder / "wandb"
        kept = _read_id(folder / "run_id")
        self._id = self._wandb_init["id"] or kept or secrets.token_hex(4)
        if self._id != kept:
            write_text(folder / "run_id", f"{self._id}\n")
        # Before wandb starts: within the same second it would take the same folder and overwrite it.
        for old in sorted(folder.glob(f"offline-run-*-{self._id}")):
            _move_into(folder / "interrupted", old)
        self._wandb_init["id"] = self._id
        self._resumed, self._begun = self._id == kept, True

    def _catch_up(self, step: int | None) -> None:
        """Send, once, what earlier attempts have logged up to a step, or all of it.

        Of the step itself, too: an attempt may have been cut between two things that it had to say of it.
        """
        if self._caught_up:
            return
        run, self._caught_up = self.experiment, True
        if not self._begun:
            return
        self._known = run.step if run.resumed else 0
        path = self._folder / "metrics.csv"
        if self._resumed and step != 0 and not path.is_file():
            log.warning(
                "%s is missing (RunCSVLogger writes it): the wandb run lacks the rows of earlier attempts; what there "
                "is of them is in %s",
                path,
                self._folder / "wandb" / "interrupted",
            )
        for row in read_rows(path)[1]:
            number = int(row.pop("step"))
            if step is None or number <= step:
                self._send({name: float(cell) for name, cell in row.items() if cell}, number)

    def _send(self, metrics: Mapping[str, Any], step: int) -> None:
        if step < self._known:
            return
        self._step = max(self._step, step)  # wandb refuses smaller ones: what comes late joins the row at hand
        prefix = self._prefix and f"{self._prefix}{self.LOGGER_JOIN_CHAR}"
        named = {f"{prefix}{name}": value for name, value in metrics.items()}
        self.experiment.log({**named, "trainer/global_step": self._step}, step=self._step)


def _read_id(path: Path) -> str | None:
    """Return the id kept in a file, or nothing if there is none or the file is damaged."""
    text = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
    return text if re.fullmatch(r"[A-Za-z0-9_-]+", text) else None


def _move_into(folder: Path, old: Path) -> None:
    """Move a folder into another one, under a name that is free there."""
    folder.mkdir(exist_ok=True)
    target, number = folder / old.name, 1
    while target.exists():
        number += 1
        target = folder / f"{old.name}-{number}"
    old.rename(target)
