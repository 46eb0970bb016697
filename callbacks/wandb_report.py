"""The edits as a table and the figures, in wandb."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger

from lit_edit.runs.files import edit_rows
from lit_edit.stream.edit_stream import EditStream

from .base import RunEndCallback


class WandbReport(RunEndCallback):
    """Sends the table of edits, the summary and the figures to wandb when a stream ends; idle without that logger.

    Must stand behind :class:`RunFigures` in the list of callbacks.
    """

    def write(self, trainer: Trainer, stream: EditStream, folder: Path) -> None:
        """Send them."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        if not loggers:
            return
        rows = edit_rows(stream.ledger.history, stream.results)
        columns = list(dict.fromkeys(name for row in rows for name in row))
        figures = sorted((folder / "figures").glob("*.png"))
        for logger in loggers:
            step = stream.edit_number
            data = [[row.get(name) for name in columns] for row in rows]
            logger.log_table("edits", columns=columns, data=data, step=step)
            for figure in figures:
                logger.log_image(f"figures/{figure.stem}", [str(figure)], step=step)
            summary = stream.summary()
            logger.experiment.summary.update({"final": summary["final"], "edits": summary["edits"]})
