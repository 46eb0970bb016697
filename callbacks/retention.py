"""Retention: are earlier edits still there?"""

from __future__ import annotations

import random
from time import perf_counter

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
    """

    def __init__(self, every: int = 10, sample: int = 50, perplexity: bool = True, seed: int = 0) -> None:
        super().__init__(check_every(every, "Retention: every"))
        if sample is None or sample < 0:
            raise ValueError(f"Retention: sample must not be negative, got {sample}")
        self.sample, self.perplexity, self.seed = sample, perplexity, seed

    def go_on(self, stream: EditStream) -> None:
        """Measure the edits made so far."""
        stream.status("measuring earlier edits")
        start = perf_counter()
        # The end is measured over all edits anyway.
        summary = stream.finish()["final"] if stream.is_at_end else self._measure(stream, stream.committed_requests())
        self.history.append({"edits": stream.edits_made, "summary": summary})
        stream.log_at_edit({**flatten(summary, "retention"), "time/retention": perf_counter() - start})

    def _measure(self, stream: EditStream, requests: list[EditRequest]) -> Summary:
        now = len(requests)
        if self.sample and now > self.sample:
            chosen = set(random.Random(f"{self.seed}-{now}").sample(range(now), self.sample))
            requests = [request for index, request in enumerate(requests) if index in chosen]
        results, perplexity = stream.measure(requests, stream.adapter, self.perplexity)
        return summarise(results.values(), stream.results["base"], perplexity.get("mean"))
