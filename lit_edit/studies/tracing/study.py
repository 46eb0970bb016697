"""Tracing a set of facts: one after another, each on record before the next begins."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Event, Lock, local

import torch
from transformers import PreTrainedTokenizerBase

from lit_edit.errors import ArgumentError
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.twin import twin
from lit_edit.studies.tracing.noise import draw_noise, embedding_deviation
from lit_edit.studies.tracing.prompts import TokenizedFact
from lit_edit.studies.tracing.trace import KINDS, FactTrace, Kind, trace_fact


@dataclass(frozen=True)
class TraceSettings:
    """What decides about the numbers of a tracing, beside model and facts; what makes no sense is refused."""

    kinds: tuple[Kind, ...] = KINDS  # what is restored
    samples: int = 10  # draws of the noise per fact
    noise: float = 3.0  # its standard deviation, in those of the subjects' embeddings over all facts
    window: int = 10  # layers restored together, of MLPs and attentions
    seed: int = 0  # of the noise

    def __post_init__(self) -> None:
        if not self.kinds or set(self.kinds) - set(KINDS) or len(set(self.kinds)) < len(self.kinds):
            raise ArgumentError(f"kinds must be some of {', '.join(KINDS)}, each once, got {', '.join(self.kinds)}")
        for name in ("samples", "window"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.noise < float("inf"):
            raise ArgumentError(f"noise must be a positive number of standard deviations, got {self.noise}")
        if self.seed < 0:
            raise ArgumentError(f"seed must not be negative, got {self.seed}")


class Tracer:
    """Traces facts on one model.

    Args:
        adapter: The model.
        tokenizer: Its tokenizer.
        facts: All of the set; the noise is scaled by the embeddings of their subjects.
        settings: How.
        fast: Multiply in bfloat16 where this device does so clearly faster; the results differ by round-off of
            bfloat16, less than the noise samples make them uncertain.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        tokenizer: PreTrainedTokenizerBase,
        facts: Sequence[TokenizedFact],
        settings: TraceSettings,
        fast: bool = False,
    ) -> None:
        self.rounds = fast and adapter.dtype == torch.float32 and adapter.bfloat16_pays()
        self.adapter = adapter.rounded(torch.bfloat16, 0) if self.rounds else adapter
        self.tokenizer, self.settings = tokenizer, settings
        self.deviation, self.width = embedding_deviation(adapter, facts)

    def trace(self, fact: TokenizedFact, check: Callable[[], object] | None = None) -> FactTrace:
        """Trace one fact; the same numbers whatever was traced before. What ``check`` raises ends the tracing."""
        settings = self.settings
        scale = settings.noise * self.deviation
        noise = draw_noise(fact, settings.samples, self.width, scale, settings.seed)
        return trace_fact(
            self.adapter,
            fact,
            torch.from_numpy(noise).to(self.adapter.device, self.adapter.dtype),
            settings.kinds,
            settings.window,
            lambda token: str(self.tokenizer.decode([token])),
            check=check,
        )

    def trace_all(
        self,
        facts: Sequence[TokenizedFact],
        finished: dict[str, FactTrace],
        keep: Callable[[FactTrace], object] | None = None,
        workers: int = 1,
    ) -> Iterator[FactTrace]:
        """Yield the trace of each fact: of those that are finished as it is, of the others when it is made and kept.

        Args:
            facts: In the order of the results.
            finished: Traces by id.
            keep: Receives each new trace when it is made, one at a time; of several workers' in any order.
            workers: Threads that trace a fact each, and share the cores.
        """
        missing = [fact for fact in facts if fact.fact.id not in finished]
        workers = min(workers, len(missing))

        def kept(trace: FactTrace) -> FactTrace:
            if keep is not None:
                keep(trace)
            return trace

        made = map(kept, map(self.trace, missing)) if workers < 2 else self._share(missing, workers, kept)
        for fact in facts:
            yield finished.get(fact.fact.id) or next(made)

    def _share(
        self, facts: Sequence[TokenizedFact], workers: int, keep: Callable[[FactTrace], FactTrace]
    ) -> Iterator[FactTrace]:
        """Yield traces in order, made by several threads, and kept as they come: one at a time, in any order."""
        threads, stop, keeping, own = torch.get_num_threads(), Event(), Lock(), local()
        kernels = nullcontext() if self.rounds else self.adapter.fast_products()  # else set and reset for all of them

        def begin() -> None:
            torch.set_num_threads(max(1, threads // workers))  # of this thread
            own.tracer = tracers.pop()

        def check() -> None:
            if stop.is_set():
                raise CancelledError

        def trace(fact: TokenizedFact) -> FactTrace:
            made = own.tracer.trace(fact, check)
            with keeping:
                return keep(made)

        tracers = [copy.copy(self) for _ in range(workers)]
        for tracer in tracers:
            tracer.adapter = twin(self.adapter)
        waiting = deque[Future[FactTrace]]()
        with kernels, ThreadPoolExecutor(workers, "tracing", begin) as pool:
            try:
                waiting.extend(pool.submit(trace, fact) for fact in facts)
                while waiting:
                    yield waiting.popleft().result()
            finally:
                stop.set()  # the pool waits for what its threads are at
                for future in waiting:
                    future.cancel()
                torch.set_num_threads(threads)


def workers_for(adapter: ModelAdapter) -> int:
    """Return how many threads trace a fact each: up to four of the cores of a CPU, else one.

    One product at a time shares cores badly, since much of a pass is not products.
    """
    return min(4, torch.get_num_threads()) if adapter.device.type == "cpu" and not adapter.sharded else 1
