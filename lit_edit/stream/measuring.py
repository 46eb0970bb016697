"""What a stream measures of its model: before, right after each edit, and at the end."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch

from lit_edit.data.datamodule import EditBatch
from lit_edit.data.request import EditRequest
from lit_edit.metrics.evaluation import (
    EditMetrics,
    EditResult,
    Summary,
    evaluate_edits,
    flatten,
    measure_perplexity,
    summarise,
)
from lit_edit.models.adapter import ModelAdapter
from lit_edit.stream.model import StreamModel
from lit_edit.stream.precision import passes_of


class MeasuredStream(StreamModel):
    """Measures the edits of a stream; validating and testing measure and never edit.

    Attributes:
        results: By stage (``base``, ``immediate``, ``final``) and id.
        perplexities: By stage.
        extra: What callbacks have measured; by stage, or beside the stages.
    """

    def __init__(self) -> None:
        super().__init__()
        self.results: dict[str, dict[str, EditResult]] = {"base": {}, "immediate": {}, "final": {}}
        self.perplexities: dict[str, dict[str, float]] = {}
        self.extra: dict[str, Any] = {}
        self._measured: EditMetrics | None = None
        self._reopened = 0  # edits of a step that an earlier process has made, until the step is taken up

    @property
    def edits_made(self) -> int:
        """How many edits this stream has made, whether they hold still or not."""
        return self.edit_number - self.ledger.history.carried

    @property
    def edit_number(self) -> int:
        """The number of the last edit made, those of an earlier run that were carried over included.

        It is what logs and curves count by; 0 is the model before any edit.
        """
        return self.ledger.made - self._reopened

    def measure(
        self, requests: Sequence[EditRequest], adapter: ModelAdapter, with_perplexity: bool = True
    ) -> tuple[dict[str, EditResult], dict[str, float]]:
        """Return results by id, and perplexity, of a model as it is now."""
        with self._time("metrics"), torch.no_grad(), passes_of(self._trainer):
            results = {r.id: r for r in evaluate_edits(adapter, self.tokenizer, requests)}
        return results, self._perplexity(adapter) if with_perplexity else {}

    def _perplexity(self, adapter: ModelAdapter) -> dict[str, float]:
        texts = getattr(getattr(self.trainer, "datamodule", None), "perplexity_texts", [])
        return self.measure_texts(texts, adapter)

    def measure_texts(self, texts: Sequence[str], adapter: ModelAdapter, leading: bool = True) -> dict[str, float]:
        """Return mean, median and corpus perplexity of texts; nothing if there are none."""
        if not texts:
            return {}
        with self._time("metrics"), torch.no_grad(), passes_of(self._trainer):
            return measure_perplexity(adapter, self.tokenizer, texts, leading)

    def summary_of(self, stage: str, requests: Sequence[EditRequest]) -> Summary:
        """Return the metrics of one stage (``base``, ``immediate`` or ``final``) over some edits."""
        results = [self.results[stage][r.id] for r in requests if r.id in self.results[stage]]
        return summarise(results, self.results["base"], self.perplexities.get(stage, {}).get("mean"))

    def log_at_edit(self, metrics: Mapping[str, float], number: int | None = None) -> None:
        """Send metrics to every logger, with the number of the last edit as step, or another one."""
        for logger in self.loggers:
            logger.log_metrics(dict(metrics), step=self.edit_number if number is None else number)

    def measuring(self) -> AbstractContextManager[Any]:
        """Return a context for measurements of one's own: their time is counted, no gradients, the run's precision."""
        stack = ExitStack()
        for context in (self._time("metrics"), torch.no_grad(), passes_of(self._trainer)):
            stack.enter_context(context)
        return stack

    # ---- validate and test: measure, never edit -----------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Begin a measurement of the model as it is."""
        # Every rank measures all of it: there is nothing to be averaged over ranks.
        warnings.filterwarnings("ignore", ".*sync_dist=True.*")
        self._align()
        self._measured = EditMetrics()
        self._measured_perplexity = self._perplexity(self.adapter)

    def validation_step(self, batch: EditBatch, batch_idx: int) -> None:
        """Measure some edits."""
        results, _ = self.measure(batch.requests, self.adapter, with_perplexity=False)
        missing = [r for r in batch.requests if r.id not in self.results["base"]]
        if missing:
            base, _ = self.measure(missing, self.ledger.original(), with_perplexity=False)
            self.results["base"] |= base
        assert self._measured is not None  # noqa: S101 - for the type checker: set at the start of the epoch
        for result in results.values():
            self._measured.update(result, self.results["base"][result.id])

    def on_validation_epoch_end(self) -> None:
        """Report the measurement."""
        self._report_measured("validate")

    def on_test_epoch_start(self) -> None:
        """Begin a measurement of the model as it is."""
        self.on_validation_epoch_start()

    def test_step(self, batch: EditBatch, batch_idx: int) -> None:
        """Measure some edits."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Report the measurement."""
        self._report_measured("test")

    def _report_measured(self, stage: str) -> None:
        assert self._measured is not None  # noqa: S101
        summary = {**self._measured.compute(), "perplexity": self._measured_perplexity.get("mean")}
        # Lightning takes "step" for the step to log at, which else would be 0.
        self.log_dict({**flatten(summary, stage), "step": float(self.edit_number)})
        self._measured = None  # float64 sums, which must not follow the model to a device without float64

    def _measure_immediate(self, requests: Sequence[EditRequest]) -> dict[str, float]:
        immediate = self.results["immediate"]
        if missing := [r for r in requests if r.id not in immediate]:
            self.status("measuring the edit")
            immediate |= self.measure(missing, self.adapter, with_perplexity=False)[0]
        return flatten(summarise([immediate[r.id] for r in requests], self.results["base"]), "immediate")
