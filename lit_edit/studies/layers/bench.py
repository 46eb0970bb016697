"""Making a sample's edits at some layers of a model, measuring them, and taking them back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import TYPE_CHECKING

from lit_edit.data.request import EditRequest
from lit_edit.editors.base import Editor
from lit_edit.errors import ArgumentError
from lit_edit.ledger.edit_ledger import EditLedger, EditRefusedError
from lit_edit.metrics.evaluation import EditResult, evaluate_edits, measure_perplexity, summarise
from lit_edit.models.adapter import ModelAdapter
from lit_edit.stats.second_moment import KeyStatistics, Progress, weights_hash
from lit_edit.stream.conflicts import ConflictPolicy
from lit_edit.stream.session import EditSession
from lit_edit.studies.layers.candidates import Layers
from lit_edit.studies.layers.trial import Stage, Trial

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

MakeEditor = Callable[[Sequence[int] | None], Editor]
"""Makes a fresh editor for some layers; ``None``: for those that it takes by itself."""


@dataclass
class Bench:
    """Tries candidates on one model, each from the original weights."""

    adapter: ModelAdapter
    tokenizer: PreTrainedTokenizerBase
    make: MakeEditor
    statistics: KeyStatistics
    texts: Sequence[str]  # whose perplexity is measured
    window: int = 16  # facts whose targets are fitted together
    on_conflict: ConflictPolicy = "replace"
    progress: Progress | None = None  # of the key statistics

    def __post_init__(self) -> None:
        self.base_hash = weights_hash(self.adapter.model)
        self._before: dict[str, EditResult] = {}

    def default_layers(self) -> Layers:
        """Return the layers that the editor takes when none are named."""
        return self.make(None).resolve_layers(self.adapter)

    def takes_groups(self) -> bool:
        """Tell whether the editor edits several layers at once."""
        try:
            self.make([0, 1])
        except ValueError:
            return False
        return self.adapter.n_layers > 1

    def measure(self, stage: Stage, layers: Layers, requests: Sequence[EditRequest]) -> Trial:
        """Make edits one after another at some layers, measure them at the end, and put the original weights back.

        Where the method cannot work at these layers (its target diverges at all edits, say), the trial has no score
        but an error.
        """
        missing = [request for request in requests if request.id not in self._before]
        self._before |= {result.id: result for result in evaluate_edits(self.adapter, self.tokenizer, missing)}
        perplexity = self._perplexity_before  # while nothing is written
        start = perf_counter()

        def failed(error: Exception) -> Trial:
            return Trial(stage, layers, len(requests), seconds=perf_counter() - start, error=str(error))

        try:
            editor = self.make(layers)
            ledger = EditLedger(self.adapter, editor.resolve_layers(self.adapter))
        except ValueError as error:  # also ArgumentError: what the editor says of these layers
            return failed(error)
        try:
            made = self._edit(editor, ledger, requests)
            results = evaluate_edits(self.adapter, self.tokenizer, requests)
            summary = summarise(results, self._before, self._perplexity())
        except (FloatingPointError, EditRefusedError, ArgumentError) as error:
            log.warning("layers %s: %s", layers, error)
            return failed(error)
        finally:
            ledger.restore_base()
        refused = len(requests) - made
        return Trial.of(stage, layers, len(requests), summary, perplexity, refused, perf_counter() - start)

    def _edit(self, editor: Editor, ledger: EditLedger, requests: Sequence[EditRequest]) -> int:
        """Make edits; return how many were made."""
        name = getattr(self.adapter.model, "name_or_path", "")
        session = EditSession(ledger, editor, name, self.base_hash, self.on_conflict, "skip")
        editor.prepare(ledger, self.tokenizer, self.statistics, progress=self.progress)
        session.begin()
        for index, request in enumerate(requests):
            first = index - index % self.window
            proposal = session.propose([request], requests[first : first + self.window])
            if proposal is not None:
                session.apply(proposal)
        return len(ledger.history.made)

    def _perplexity(self) -> float:
        return measure_perplexity(self.adapter, self.tokenizer, self.texts)["mean"]

    @cached_property
    def _perplexity_before(self) -> float:
        return self._perplexity()
