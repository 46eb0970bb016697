"""Retention: are earlier edits still there?"""

from __future__ import annotations

import random
from time import perf_counter
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_edit.data.request import EditRequest
from lit_edit.metrics.evaluation import Summary, flatten, summarise
from lit_edit.stream.edit_stream import EditStream

from .base import as_stream, check_every, is_due


class Retention(Callback):
    """Measures the edits made so far after every ``every`` edits, all of them or a sample.

    Args:
        every: Measure after every so many edits.
        sample: Measure at most this many of them, chosen at random; 0 measures all.
        perplexity: Measure perplexity as well.
        seed: Seeds the choice.

    Attributes:
        history: The metrics, with the number of ``edits`` made until then.
        missed: By id, after how many edits one was first found not to hold, of those that were not found to hold since.
    """

    def __init__(self, every: int = 10, sample: int = 50, perplexity: bool = True, seed: int = 0) -> None:
        self.every = check_every(every, "Retention: every")
        if sample is None or sample < 0:
            raise ValueError(f"Retention: sample must not be negative, got {sample}")
        self.sample, self.perplexity, self.seed = sample, perplexity, seed
        self.history: list[dict[str, Any]] = []
        self.missed: dict[str, int] = {}
        self._seen = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where the stream starts."""
        self._seen = as_stream(pl_module, self).edits_made

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Measure when it is time."""
        stream = as_stream(pl_module, self)
        now = stream.edits_made
        if is_due(self._seen, now, self.every):
            stream.status("measuring earlier edits")
            start = perf_counter()
            requests = stream.committed_requests()
            # The end is measured over all edits anyway.
            summary = stream.finish()["final"] if stream.is_at_end else self._measure(stream, requests)
            self.history.append({"edits": now, "summary": summary})
            stream.log_at_edit({**flatten(summary, "retention"), "time/retention": perf_counter() - start})
        self._seen = now

    def _measure(self, stream: EditStream, requests: list[EditRequest]) -> Summary:
        now = len(requests)
        if self.sample and now > self.sample:
            chosen = set(random.Random(f"{self.seed}-{now}").sample(range(now), self.sample))
            requests = [request for index, request in enumerate(requests) if index in chosen]
        results, perplexity = stream.measure(requests, stream.adapter, self.perplexity)
        for name, result in results.items():
            if all(result.efficacy[0].hits):
                self.missed.pop(name, None)
            else:
                self.missed.setdefault(name, stream.edits_made)
        return summarise(results.values(), stream.results["base"], perplexity.get("mean"))

    def state_dict(self) -> dict[str, Any]:
        """Return the history, and which edits were missed."""
        return {"history": self.history, "missed": self.missed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.history = list(state_dict["history"])
        self.missed = dict(state_dict.get("missed", {}))


def missed_edits(trainer: Trainer) -> dict[str, int]:
    """Return what the run's :class:`Retention` has missed along the stream; nothing where there is none."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return {name: at for one in callbacks if isinstance(one, Retention) for name, at in one.missed.items()}
