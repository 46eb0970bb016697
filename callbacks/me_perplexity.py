"""Perplexity collapse: ME-PPL after every few edits (arXiv 2402.09656, 2406.11263)."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lit_edit.data.datamodule import perplexity_texts
from lit_edit.models.adapter import ModelAdapter
from lit_edit.stream.edit_stream import EditStream

from .base import CourseCallback, check_every

log = logging.getLogger(__name__)

NUMBERS = ("mean", "median", "corpus")


class MEPerplexity(CourseCallback):
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

    measured_by = "texts"

    def __init__(
        self,
        every: int = 1,
        path: str | None = None,
        limit: int | None = None,
        threshold: float = 1000.0,
        bos: bool = False,
    ) -> None:
        super().__init__(check_every(every, "MEPerplexity: every"))
        self.limit = None if limit is None else check_every(limit, "MEPerplexity: limit")
        if not threshold > 1:
            raise ValueError(f"MEPerplexity: threshold must be above 1, which no perplexity is below, got {threshold}")
        self.path, self.threshold, self.bos = path, threshold, bos
        self.texts: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the sentences: what is wrong with them is to be known before the first edit."""
        self.texts = perplexity_texts(self.path)[: self.limit]

    def end(self, stream: EditStream) -> None:
        """Measure the end, and log it as such."""
        super().end(stream)
        stream.log_at_edit({f"final/me_perplexity/{name}": self.history[-1][name] for name in NUMBERS})

    def measure(self, stream: EditStream, adapter: ModelAdapter) -> dict[str, Any]:
        """Return the perplexities."""
        stream.status("measuring ME-PPL")
        return dict(stream.measure_texts(self.texts, adapter, leading=self.bos))

    def publish(self, stream: EditStream) -> None:
        """Put the history into the summary, and its first and last point under ``base`` and ``final``."""
        stream.extra["me_perplexity"] = self.history
        for stage, point in (("base", self.history[0]), ("final", self.history[-1])):
            stream.extra.setdefault(stage, {})["me_perplexity"] = {name: point[name] for name in NUMBERS}

    def report(self, stream: EditStream, seconds: float) -> None:
        """Log the last point; say it if the model has collapsed since the one before."""
        last = self.history[-1]
        before = self.history[-2] if len(self.history) > 1 else last
        stream.log_at_edit({**{f"me_perplexity/{name}": last[name] for name in NUMBERS}, "time/me_perplexity": seconds})
        if self.has_collapsed(last["mean"]) and not self.has_collapsed(before["mean"]):
            log.warning(
                "collapse: the mean perplexity of %d sentences is %.4g (bound %g), up from %.4g: one of the edits "
                "%d to %d did it, or all of them together",
                len(self.texts),
                last["mean"],
                self.threshold,
                before["mean"],
                before["edits"] + 1,
                last["edits"],
            )

    def has_collapsed(self, mean: float) -> bool:
        """Tell whether a mean perplexity is past the bound, or not a number."""
        return not (math.isfinite(mean) and mean <= self.threshold)

    def how(self) -> str:
        """Return what tells these texts, and how they are read, from others."""
        return hashlib.sha256(json.dumps([self.texts, self.bos]).encode()).hexdigest()[:16]
