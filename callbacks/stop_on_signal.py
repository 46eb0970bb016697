"""Stopping between two edits when a cluster asks, on all ranks together, and having the job started again."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_edit.stream.edit_stream import EditStream

from .base import as_stream

log = logging.getLogger(__name__)


class StoppedBySignal(SystemExit):
    """The stream has been stopped between two edits, on every rank, and can go on from there."""


class StopOnSignal(Callback):
    """Ends a stream behind the edit at hand when SIGUSR1 (time is nearly up) or SIGTERM comes, to any of the ranks.

    All ranks then write a checkpoint; every edit is in the journal in any case. Under SLURM the job is put back into
    the queue on SIGUSR1, as Lightning does by itself, but between two edits: its own way saves in the middle of
    whatever is going on, where ranks are waiting for each other. With ``--resume auto`` the job then goes on.

    Args:
        requeue: Put a SLURM job back into the queue on SIGUSR1.
    """

    def __init__(self, requeue: bool = True) -> None:
        self.requeue = requeue
        self._asked = 0  # signal number
        self._handlers: dict[int, Any] = {}
        self._listens = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen from the start: what is asked for before the first edit is done behind it."""
        if stage == "fit":
            self._listen(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen on, in the place of Lightning's handlers."""
        as_stream(pl_module, self)
        self._listen(trainer)

    def _listen(self, trainer: Trainer) -> None:
        self._listens = True
        environment = trainer.strategy.cluster_environment if hasattr(trainer.strategy, "cluster_environment") else None
        slurm = environment if isinstance(environment, SLURMEnvironment) else None
        self._requeues = self.requeue and slurm is not None and slurm.auto_requeue
        self._signals = [signal.SIGTERM, (slurm.requeue_signal if slurm else None) or signal.SIGUSR1]
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                before = signal.signal(number, self._ask)
                self._handlers.setdefault(number, before)

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = number
        if not self._listens:  # Lightning has put this handler back behind the end of the stream
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Stop if one of the ranks was asked to."""
        stream = as_stream(pl_module, self)
        asked = max(stream.ranks.gather(self._asked)) if stream.ranks.together else self._asked
        if asked:
            self._stop(trainer, stream, asked)

    def _stop(self, trainer: Trainer, stream: EditStream, asked: int) -> None:
        path = Path(trainer.default_root_dir) / "checkpoints" / f"stopped-{stream.edits_made}.ckpt"
        trainer.save_checkpoint(stream.ranks.agree(str(path)))
        again = self._requeues and asked != signal.SIGTERM
        if trainer.is_global_zero:
            log.warning("stopped behind edit %d by %s", stream.edits_made, signal.Signals(asked).name)
            if again:
                requeue()
        raise StoppedBySignal(0 if again else 128 + asked)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen no longer."""
        self._listens = False
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()


def requeue() -> None:
    """Put this SLURM job back into the queue."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{task}"
    try:
        result = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)  # noqa: S607
    except OSError as error:
        log.warning("the job could not be put back into the queue (%s): submit it again", error)
        return
    if result.returncode:
        log.warning("scontrol requeue %s failed: %s Submit the job again", job, result.stderr.strip())
    else:
        log.warning("job %s is back in the queue", job)
