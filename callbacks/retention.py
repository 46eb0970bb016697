"""Retention: are earlier edits still there?"""

from __future__ import annotations

import random
from time import perf_counter

from lightning.pytorch import Callback, Trainer

from lit_edit.data.request import EditRequest
from lit_edit.metrics.evaluation import Summary, flatten, summarise
from lit_edit.stream.edit_stream import EditStream

from .base import EveryCallback, check_every


class Retention(EveryCallback):
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
        super().__init__(check_every(every, "Retention: every"))
        if sample is None or sample < 0:
            raise ValueError(f"Retention: sample must not be negative, got {sample}")
        self.sample, self.perplexity, self.seed = sample, perplexity, seed
        self.missed: dict[str, int] = {}
        self.kept["missed"] = "missed"

    def go_on(self, stream: EditStream) -> None:
        """Measure the edits made so far."""
        stream.status("measuring earlier edits")
        start = perf_counter()
        # The end is measured over all edits anyway.
        summary = stream.finish()["final"] if stream.is_at_end else self._measure(stream, stream.committed_requests())
        self.history.append({"edits": stream.edit_number, "summary": summary})
        stream.log_at_edit({**flatten(summary, "retention"), "time/retention": perf_counter() - start})

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
                self.missed.setdefault(name, stream.edit_number)
        return summarise(results.values(), stream.results["base"], perplexity.get("mean"))


def missed_edits(trainer: Trainer) -> dict[str, int]:
    """Return what the run's :class:`Retention` has missed along the stream; nothing where there is none."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return {name: at for one in callbacks if isinstance(one, Retention) for name, at in one.missed.items()}
