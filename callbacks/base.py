"""What all callbacks of an edit stream share."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_edit.stream import EditStream


def as_stream(module: LightningModule, callback: object) -> EditStream:
    """Return the module as an edit stream.

    Raises:
        MisconfigurationException: If it is something else.
    """
    if not isinstance(module, EditStream):
        raise MisconfigurationException(
            f"{type(callback).__name__} follows an EditStream, got a {type(module).__name__}: remove the callback or "
            "fit an EditStream"
        )
    return module


def check_every(value: int, name: str, low: int = 1) -> int:
    """Return a number of edits, checked to be at least one (or another bound)."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    return value


def is_due(before: int, now: int, every: int) -> bool:
    """Tell whether a multiple of ``every`` lies in ``(before, now]``: steps may commit several edits at once.

    Example:
        >>> is_due(3, 5, 5), is_due(5, 7, 5)
        (True, False)
    """
    return now // every > before // every


class RunEndCallback(Callback):
    """Writes something into the run folder when a stream has ended; subclasses say what in :meth:`write`.

    Args:
        folder: The run folder; by default the Trainer's ``default_root_dir``.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the last measurement, if nobody has, and write."""
        stream = as_stream(pl_module, self)
        stream.finish()  # on every rank
        if trainer.is_global_zero:
            self.write(trainer, stream, Path(self.folder or trainer.default_root_dir))

    @abstractmethod
    def write(self, trainer: Trainer, stream: EditStream, folder: Path) -> None:
        """Write; called on the first rank alone."""
