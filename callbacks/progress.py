"""A progress bar that says which edit is being made and how sure the model is of it."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from .base import as_stream, check_every


class EditProgressBar(TQDMProgressBar):
    """Shows the current edit, the probability of its target, and what is being worked on.

    Args:
        refresh_rate: Redraw after every so many steps; 0 shows no bar.
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=check_every(refresh_rate, "EditProgressBar: refresh_rate", 0))
        self._last = ""
        self._statistics_bar: Tqdm | None = None

    def init_train_tqdm(self) -> Tqdm:
        """Return the bar, with room for text behind it."""
        return Tqdm(
            desc="edits",
            position=2 * self.process_position,
            disable=self.is_disabled,
            dynamic_ncols=True,
            file=sys.stderr,  # standard output is for what is to be kept
            smoothing=0,
            bar_format="{desc} {n_fmt}/{total_fmt} |{bar:20}| {elapsed}<{remaining} {postfix}",
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen to the stream from the start: statistics come before the first edit."""
        super().setup(trainer, pl_module, stage)
        stream = as_stream(pl_module, self)
        if self.is_enabled and trainer.is_global_zero:
            stream.status, stream.progress = self._show, self._count_tokens

    def on_train_start(self, *args: Any) -> None:
        """Begin at the steps that are behind a run that goes on: Lightning begins no epoch then, nor tells a total."""
        super().on_train_start(*args)
        self.train_progress_bar.reset(self.trainer.num_training_batches)
        self._count_from(self.trainer.fit_loop.epoch_loop.batch_progress.current.ready)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Count the step; those that are only taken up from the journal say nothing of how fast edits are made."""
        super().on_train_batch_end(trainer, pl_module, *args)
        if as_stream(pl_module, self).ledger.ahead:
            self._count_from(trainer.fit_loop.epoch_loop.batch_progress.current.ready)

    def _count_from(self, steps: int) -> None:
        """Let elapsed and remaining time be of the steps behind the first so many."""
        bar = self.train_progress_bar
        bar.initial = bar.n = steps
        bar.start_t = bar.last_print_t = time.time()
        if not bar.disable:
            bar.refresh()

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Start the bar at the edits already made."""
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description_str("edits")

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what stands behind the bar: the last edit and the probability of its target."""
        entries = as_stream(pl_module, self).ledger.entries
        if not entries:
            return {}
        entry = entries[-1]
        sure = entry.facts.get("target_probability", float("nan"))
        self._last = f"{entry.subject} → {entry.target_new} (p {sure:.2f})"
        return {"last": self._last}

    def _show(self, message: str) -> None:
        bar = self._train_progress_bar
        if bar is not None and not bar.disable:
            bar.set_postfix_str(f"{self._last} {message}" if self._last else message, refresh=sys.stderr.isatty())

    def _count_tokens(self, done: int, total: int) -> None:
        """Show how far the key statistics are."""
        if self._statistics_bar is None:
            self._statistics_bar = Tqdm(desc="key statistics (once)", total=total, unit="token", leave=True)
        self._statistics_bar.n = done
        self._statistics_bar.refresh()
        if done >= total:
            self._statistics_bar.close()
            self._statistics_bar = None
