"""The run as a page: ``report.html``."""

from __future__ import annotations

import logging
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from lit_edit.report import write_report
from lit_edit.report.reading import write_unfinished
from lit_edit.stream import EditStream

from .base import RunEndCallback

log = logging.getLogger(__name__)


class RunReport(RunEndCallback):
    """Writes ``report.html``, one file that needs nothing else, when a stream ends, also when it is cut short.

    Must stand behind :class:`RunFolder` in the list of callbacks: it shows what that writes.

    Args:
        folder: The run folder; by default the Trainer's ``default_root_dir``.
    """

    def write(self, trainer: Trainer, stream: EditStream, folder: Path) -> None:
        """Write the report of all that was measured."""
        _flush(trainer)
        write_report(folder)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the report of an interrupted stream; nothing is measured for it, and nothing else fails with it."""
        if not (trainer.is_global_zero and isinstance(pl_module, EditStream) and pl_module.model is not None):
            return
        if not len(pl_module.ledger.history.made):
            return  # nothing was done; the command line takes such a folder away
        folder = Path(self.folder or trainer.default_root_dir)
        try:
            _flush(trainer)
            write_unfinished(folder, pl_module)
            write_report(folder)
        except Exception as error:  # what has stopped the run is what the user must read
            log.warning("the report of the interrupted run was not written: %s", error)


def _flush(trainer: Trainer) -> None:
    """Have the row at hand written: the report reads it."""
    for logger in trainer.loggers:
        logger.save()
