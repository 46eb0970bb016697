"""Perplexity collapse: ME-PPL after every few edits (arXiv 2402.09656, 2406.11263)."""

from __future__ import annotations

import logging
import math
from time import perf_counter
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_edit.data.datamodule import perplexity_texts
from lit_edit.models.adapter import ModelAdapter
from lit_edit.stream import EditStream

from .base import as_stream, check_every, is_due

log = logging.getLogger(__name__)

NUMBERS = ("mean", "median", "corpus")


class MEPerplexity(Callback):
    """Measures the perplexity of a set of sentences before the first edit, after every ``every`` edits, and at the end.

    The mean over sentences is the published number; it has a heavy tail, so median and corpus perplexity stand beside
    it. A mean above ``threshold`` is called a collapse: it is warned about once, with the edits that it lies between.

    Args:
        every: Measure after every so many edits.
        path: The sentences: ME-PPL's JSON list of ``{"Corpus", "Text"}`` (its set of 50 is meant for every edit, the
            larger ones for the end), or lines of text; by default sentences written for this project.
        limit: Take the first so many.
        threshold: Mean perplexity above which a model has collapsed; 1000 as published.
        bos: Put the tokenizer's own leading tokens before each sentence, for models that cannot do without; the
            published numbers are without.
    """

    def __init__(
        self,
        every: int = 1,
        path: str | None = None,
        limit: int | None = None,
        threshold: float = 1000.0,
        bos: bool = False,
    ) -> None:
        self.every = check_every(every, "MEPerplexity: every")
        self.limit = None if limit is None else check_every(limit, "MEPerplexity: limit")
        if not threshold > 1:
            raise ValueError(f"MEPerplexity: threshold must be above 1, which no perplexity is below, got {threshold}")
        self.path, self.threshold, self.bos = path, threshold, bos
        self.texts: list[str] = []
        self.history: list[dict[str, Any]] = []
        self._seen = 0
        self._held: tuple[int, ...] | None = None  # the edits that held at the last measurement
        self._ended: tuple[int, ...] | None = None  # and at the end, when it was reported

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the sentences: what is wrong with them is to be known before the first edit."""
        self.texts = perplexity_texts(self.path)[: self.limit]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand on what an earlier process has measured."""
        self._report(as_stream(pl_module, self))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the unedited model, unless that was done."""
        stream = as_stream(pl_module, self)
        self._seen = stream.edits_made
        if not self.history:
            self._measure(stream, stream.ledger.original(), 0)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Measure when it is time."""
        stream = as_stream(pl_module, self)
        if is_due(self._seen, stream.edits_made, self.every):
            self._measure(stream, stream.adapter, stream.edits_made)
        self._seen = stream.edits_made

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the end."""
        self._finish(as_stream(pl_module, self))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the end of a stream that was resumed there: nothing was trained."""
        self._finish(as_stream(pl_module, self))

    def _finish(self, stream: EditStream) -> None:
        stream.finish()  # brings a stream that was resumed at its end up to its journal
        held = _held(stream)
        if self._ended == held:
            return
        if not self.history:
            self._measure(stream, stream.ledger.original(), 0)
        if self._held != held:
            self._measure(stream, stream.adapter, stream.edits_made)
        self._ended = held
        stream.log_at_edit({f"final/me_perplexity/{name}": self.history[-1][name] for name in NUMBERS})

    def _measure(self, stream: EditStream, adapter: ModelAdapter, edits: int) -> None:
        stream.status("measuring ME-PPL")
        start = perf_counter()
        found = stream.measure_texts(self.texts, adapter, leading=self.bos)
        if edits and self.history[-1]["edits"] == edits:  # edits were taken out since, or it was resumed here
            del self.history[-1]
        before = self.history[-1] if self.history else None
        self.history.append({"edits": edits, **found})
        self._held = None if adapter is not stream.adapter else _held(stream)
        self._report(stream)
        stream.log_at_edit(
            {
                **{f"me_perplexity/{name}": value for name, value in found.items()},
                "time/me_perplexity": perf_counter() - start,
            }
        )
        if self.has_collapsed(found["mean"]) and before is not None and not self.has_collapsed(before["mean"]):
            log.warning(
                "collapse: the mean perplexity of %d sentences is %.4g (bound %g), up from %.4g: one of the edits "
                "%d to %d did it, or all of them together",
                len(self.texts),
                found["mean"],
                self.threshold,
                before["mean"],
                before["edits"] + 1,
                edits,
            )

    def has_collapsed(self, mean: float) -> bool:
        """Tell whether a mean perplexity is past the bound, or not a number."""
        return not (math.isfinite(mean) and mean <= self.threshold)

    def _report(self, stream: EditStream) -> None:
        """Put what was measured into the stream's summary."""
        if not self.history:
            return
        stream.extra["me_perplexity"] = self.history
        for stage, point in (("base", self.history[0]), ("final", self.history[-1])):
            stream.extra.setdefault(stage, {})["me_perplexity"] = {name: point[name] for name in NUMBERS}

    def state_dict(self) -> dict[str, Any]:
        """Return the history."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history."""
        self.history = list(state_dict["history"])


def _held(stream: EditStream) -> tuple[int, ...]:
    return tuple(entry.number for entry in stream.ledger.entries)
