"""What all callbacks of an edit stream share."""

from __future__ import annotations

import logging
from abc import abstractmethod
from copy import copy
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_edit.models.adapter import ModelAdapter
from lit_edit.stream.edit_stream import EditStream

log = logging.getLogger(__name__)


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


class EveryCallback(Callback):
    """Does something after every ``every`` edits; subclasses say what in :meth:`go_on`.

    Args:
        every: Edits between two times; 0 for never.

    Attributes:
        history: What was found so far; it is kept in checkpoints.
        kept: What checkpoints keep: by its name there, the attribute. Subclasses add theirs.
        measured_by: Name in checkpoints of :meth:`how`, where what was found depends on more than model and edits.
    """

    measured_by: ClassVar[str | None] = None

    def __init__(self, every: int) -> None:
        self.every = every
        self.history: list[dict[str, Any]] = []
        self.kept = {"history": "history"}
        self._seen = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where the stream starts."""
        stream = as_stream(pl_module, self)
        self._seen = stream.edits_made
        self.begin(stream)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Go on when it is time."""
        self._look(as_stream(pl_module, self))

    def _look(self, stream: EditStream) -> None:
        now = stream.edits_made
        if self.due(stream):
            self.go_on(stream)
        self._seen = now

    def due(self, stream: EditStream) -> bool:
        """Tell whether it is time."""
        return bool(self.every) and is_due(self._seen, stream.edits_made, self.every)

    def begin(self, stream: EditStream) -> None:
        """Do what is to be done where the stream starts."""

    @abstractmethod
    def go_on(self, stream: EditStream) -> None:
        """Do it, between two edits."""

    def how(self) -> Any:
        """Return what the findings depend on beside model and edits, as primitives."""

    def state_dict(self) -> dict[str, Any]:
        """Return what was found, and how."""
        how = {self.measured_by: self.how()} if self.measured_by else {}
        return {**{name: getattr(self, attribute) for name, attribute in self.kept.items()}, **how}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what was found, if it was found in the same way."""
        if self.measured_by in state_dict and state_dict[self.measured_by] != self.how():
            name = type(self).__name__
            log.warning(
                "%s: its settings or data have changed since the checkpoint: what was measured is dropped", name
            )
            return
        for name, attribute in self.kept.items():
            if name in state_dict:  # of earlier versions some are missing
                setattr(self, attribute, copy(state_dict[name]))


class StagedCallback(EveryCallback):
    """Measures before the first edit (:meth:`begin`), after every ``every`` edits, and at the end; subclasses say what.

    The end is measured once for the edits that hold there: again if some were taken out since, and also where a run was
    resumed at its end and nothing was left to train.

    Args:
        every: Edits between two measurements; 0 measures before the first edit and at the end only.
    """

    def __init__(self, every: int) -> None:
        super().__init__(every)
        self._ended: list[int] | None = None  # the edits that held when the end was measured

    def due(self, stream: EditStream) -> bool:
        """Tell whether it is time to measure; the end has its own measurement."""
        return super().due(stream) and not stream.is_at_end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the end."""
        self.on_fit_end(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the end, also of a stream that was resumed there: nothing was trained."""
        stream = as_stream(pl_module, self)
        stream.finish()  # brings a stream that was resumed at its end up to its journal
        held = held_edits(stream)
        if self._ended != held:
            self.begin(stream)
            self.end(stream)
            self._ended = held

    @abstractmethod
    def end(self, stream: EditStream) -> None:
        """Measure the model as it is at the end."""


class CourseCallback(StagedCallback):
    """Measures one and the same thing all along a stream; subclasses say what in :meth:`measure`.

    Attributes:
        history: What was measured, with the number of ``edits`` made until then; it is kept in checkpoints.
    """

    def __init__(self, every: int) -> None:
        super().__init__(every)
        self._held: list[int] | None = None  # the edits that held at the last measurement
        self.kept["held"] = "_held"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand on what an earlier process has measured, also where nothing is left to train."""
        if self.history:
            self.publish(as_stream(pl_module, self))

    def begin(self, stream: EditStream) -> None:
        """Measure the unedited model, unless that was done."""
        if not self.history:
            self._add(stream, stream.ledger.original(), 0)

    def go_on(self, stream: EditStream) -> None:
        """Measure the model as it is."""
        self._add(stream, stream.adapter, stream.edit_number)
        self._held = held_edits(stream)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Measure when it is time, and behind the last step at once: its checkpoint is to hold the end."""
        super().on_train_batch_end(trainer, pl_module, *args)
        stream = as_stream(pl_module, self)
        if stream.is_at_end:
            CourseCallback.end(self, stream)

    def end(self, stream: EditStream) -> None:
        """Measure the end, unless the last measurement was of the same edits."""
        if self._held != held_edits(stream):
            self.go_on(stream)

    def _add(self, stream: EditStream, adapter: ModelAdapter, edits: int) -> None:
        start = perf_counter()
        point = {"edits": edits, **self.measure(stream, adapter)}
        if edits and self.history[-1]["edits"] == edits:  # edits were taken out since, or it was resumed here
            del self.history[-1]
        self.history.append(point)
        self.publish(stream)
        self.report(stream, perf_counter() - start)

    @abstractmethod
    def measure(self, stream: EditStream, adapter: ModelAdapter) -> dict[str, Any]:
        """Return a measurement of a model: the unedited one or the stream's own, as it is."""

    @abstractmethod
    def publish(self, stream: EditStream) -> None:
        """Put the history into the stream's summary."""

    @abstractmethod
    def report(self, stream: EditStream, seconds: float) -> None:
        """Log the last measurement, and what it took."""


def held_edits(stream: EditStream) -> list[int]:
    """Return the numbers of the edits that hold."""
    return [entry.number for entry in stream.ledger.entries]
