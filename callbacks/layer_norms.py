"""The edited layers' L1 norms, whose growth goes with a model's decline (D4S, arXiv 2410.23843, section 3)."""

from __future__ import annotations

from lit_edit.runs.logged import logged_norms
from lit_edit.stream.edit_stream import EditStream

from .base import EveryCallback, check_every


class LayerNorms(EveryCallback):
    """Logs, per edited weight, mean |W|, mean |delta W| and |delta W| / |W|, to every logger.

    Args:
        every: Log after every so many edits.
    """

    def __init__(self, every: int = 1) -> None:
        super().__init__(check_every(every, "LayerNorms: every"))

    def begin(self, stream: EditStream) -> None:
        """Log the unedited layers, unless that was done."""
        if not self.history:
            self.go_on(stream)

    def go_on(self, stream: EditStream) -> None:
        """Log the layers as they are."""
        norms = stream.ledger.layer_norms()
        self.history.append({"edits": stream.edit_number, "layers": norms})
        stream.log_at_edit(logged_norms(norms))
