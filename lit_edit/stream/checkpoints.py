"""What a checkpoint of a stream holds, and how it is taken up: updates and state, in place of the model's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_edit.errors import ArgumentError
from lit_edit.metrics.evaluation import EditResult
from lit_edit.stream.measuring import MeasuredStream

_FORMAT = 2  # of what a checkpoint holds


class SavedStream(MeasuredStream):
    """Puts a stream into checkpoints and takes it up from them."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False  # checkpoints hold updates, not the model
        self._restored: dict[str, Any] | None = None  # of a checkpoint, until the editor is ready for it
        self._open = 0  # edits of the step at hand that are made while its measurements and logs are not

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put updates and state into the checkpoint, in place of the model's weights."""
        for logger in self.loggers:  # what the checkpoint knows of must not be in a logger's hands only
            logger.save()
        checkpoint["state_dict"] = {}
        checkpoint["lit_edit"] = {
            "format": _FORMAT,
            "base_hash": self.base_hash,
            "ledger": self.ledger.state_dict(),
            "editor": self.editor.state_dict() if self._restored is None else self._restored["editor"],
            "results": {
                stage: [result.as_state() for result in results.values()] for stage, results in self.results.items()
            },
            "perplexities": self.perplexities,
            "seconds": dict(self.seconds),
            "open": self._open + self._reopened if self.trainer.interrupted else 0,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the saved updates into the freshly loaded model.

        Raises:
            ArgumentError: If the checkpoint is not one of lit-edit, or was made with another model or config.
        """
        saved = checkpoint.get("lit_edit")
        if not isinstance(saved, Mapping) or saved.get("format") != _FORMAT:
            raise ArgumentError("this checkpoint was not written by this version of lit-edit")
        self.restore(saved)
        stream = getattr(getattr(self.trainer, "datamodule", None), "requests", ())
        if len(self.ledger.history.handled) < len(stream) and "loops" in checkpoint:
            # A run stopped by max_steps, or one that has had all data of then, counts its epoch as done.
            checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False
            for progress in ("total", "current"):
                checkpoint["loops"]["fit_loop"]["epoch_progress"][progress] |= {"processed": 0, "completed": 0}
        if self._reopened and "loops" in checkpoint:  # its step is done once more, but for the commit
            for progress in checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"].values():
                if isinstance(progress, dict):
                    progress["processed"] = progress["completed"]

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Write the updates that a checkpoint holds under ``lit_edit``.

        Raises:
            ArgumentError: If they belong to another model or another config.
        """
        self.configure_model()
        if saved["base_hash"] != self.base_hash:
            raise ArgumentError(
                f"the checkpoint edits other base weights than those of {self.language_model.name!r} "
                f"(hash {saved['base_hash']} against {self.base_hash}); load the model it was made with"
            )
        begun = bool(saved["ledger"]["history"]["made"])  # a run cut before its first edit starts anew
        if begun:
            self.editor.check_state(saved["editor"], self.ledger.layers)
        self.ledger.load_state_dict(saved["ledger"])
        self.results = {
            stage: {state["id"]: EditResult.from_state(state) for state in states}
            for stage, states in saved["results"].items()
        }
        self.perplexities = dict(saved["perplexities"])
        self.seconds = {**saved["seconds"], "load": self.seconds.get("load", 0.0)}
        self._restored = {"editor": saved["editor"]} if begun else None
        self._reopened, self._open = saved.get("open", 0), 0

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: a checkpoint holds edits, not a model, and Lightning's way of reading it unpickles.

        Raises:
            MisconfigurationException: Always; it says what to do.
        """
        raise MisconfigurationException(
            "a checkpoint of an edit stream holds its edits, not the model: give it to Trainer.fit, validate or test "
            "as ckpt_path, or take the edited model of a run with lit-edit export"
        )
