"""The run as a page: ``report.html``."""

from __future__ import annotations

import logging
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from lit_edit.report import write_report
from lit_edit.report.reading import write_notes
from lit_edit.stream.edit_stream import EditStream

from .base import RunEndCallback

log = logging.getLogger(__name__)


class RunReport(RunEndCallback):
    """Writes ``report.html``, one file that needs nothing else, when a stream ends, also when it is cut short.

    Must stand behind :class:`RunFolder` in the list of callbacks: it shows what that writes.
    """

    def write(self, trainer: Trainer, stream: EditStream, folder: Path) -> None:
        """Write the report of all that was measured."""
        self._try(trainer, folder)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the report of an interrupted stream; nothing is measured for it."""
        ledger = getattr(pl_module, "ledger", None)  # there is none before the model is loaded whole
        if trainer.is_global_zero and isinstance(pl_module, EditStream) and ledger is not None and ledger.history.made:
            self._try(trainer, Path(self.folder or trainer.default_root_dir), pl_module)

    def _try(self, trainer: Trainer, folder: Path, cut: EditStream | None = None) -> None:
        """Write the page; a run does not fail for the want of it, and what has stopped one is not hidden by it."""
        try:
            for logger in trainer.loggers:  # the row at hand is to be on disk
                logger.save()
            if cut is not None:
                write_notes(folder, cut)
            write_report(folder)
        except Exception as error:
            log.warning("report.html was not written (%s); lit-edit report --run %s makes it", error, folder)
