"""The edited layers' L1 norms, whose growth goes with a model's decline (D4S, arXiv 2410.23843, section 3)."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from .base import as_stream, check_every, is_due


class LayerNorms(Callback):
    """Logs, per edited weight, mean |W|, mean |delta W| and |delta W| / |W|, to every logger.

    Args:
        every: Log after every so many edits.
    """

    def __init__(self, every: int = 1) -> None:
        self.every = check_every(every, "LayerNorms: every")
        self.history: list[dict[str, Any]] = []
        self._seen = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the unedited layers."""
        self._seen = as_stream(pl_module, self).edits_made
        if not self.history:
            self._log(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Log when it is time."""
        now = as_stream(pl_module, self).edits_made
        if is_due(self._seen, now, self.every):
            self._log(pl_module)
        self._seen = now

    def _log(self, module: LightningModule) -> None:
        stream = as_stream(module, self)
        norms = stream.ledger.layer_norms()
        self.history.append({"edits": stream.edits_made, "layers": norms})
        metrics = {}
        for name, values in norms.items():
            metrics[f"norm/{name}/mean_abs_w"] = values["mean_abs_after"]
            metrics[f"norm/{name}/mean_abs_delta"] = values["mean_abs_delta"]
            metrics[f"norm/{name}/relative_change"] = values["relative_change"]
        stream.log_at_edit(metrics)

    def state_dict(self) -> dict[str, Any]:
        """Return the history."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history."""
        self.history = list(state_dict["history"])
