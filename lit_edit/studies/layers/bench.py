"""Making a sample's edits at some layers of a model, measuring them, and taking them back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

from lit_edit.data.request import EditRequest
from lit_edit.editors.base import Editor, Status, silent
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


class Bench:
    """Tries candidates on one model, each from the original weights.

    Args:
        adapter: The model, unedited.
        tokenizer: Its tokenizer.
        make: Makes the editor.
        statistics: Where key statistics come from.
        texts: Whose perplexity is measured.
        window: Facts whose targets are fitted together.
        on_conflict: What to do about an edit of a fact that was edited before.
        status: Receives a line about what is going on.
        progress: Of the key statistics.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        tokenizer: PreTrainedTokenizerBase,
        make: MakeEditor,
        statistics: KeyStatistics,
        texts: Sequence[str],
        window: int = 16,
        on_conflict: ConflictPolicy = "replace",
        status: Status = silent,
        progress: Progress | None = None,
    ) -> None:
        self.adapter, self.tokenizer, self.make, self.statistics = adapter, tokenizer, make, statistics
        self.texts, self.window, self.on_conflict = list(texts), window, on_conflict
        self.status, self.progress = status, progress
        self.base_hash = weights_hash(adapter.model)
        self._before: dict[str, EditResult] = {}
        self._perplexity: float | None = None

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

        Returns:
            The trial. Where the method cannot work at these layers (its target diverges at all edits, say), it has no
            score but an error.
        """
        before, perplexity = self._measure_before(requests)
        start = perf_counter()
        try:
            editor = self.make(layers)
            ledger = EditLedger(self.adapter, editor.resolve_layers(self.adapter))
        except ValueError as error:  # also ArgumentError: what the editor says of these layers
            return Trial(stage, layers, len(requests), seconds=perf_counter() - start, error=str(error))
        try:
            made = self._edit(editor, ledger, requests)
            results = evaluate_edits(self.adapter, self.tokenizer, requests)
            after = measure_perplexity(self.adapter, self.tokenizer, self.texts)["mean"]
            summary = summarise(results, before, after)
        except (FloatingPointError, EditRefusedError, ArgumentError) as error:
            log.warning("layers %s: %s", layers, error)
            return Trial(stage, layers, len(requests), seconds=perf_counter() - start, error=str(error))
        finally:
            ledger.restore_base()
        refused = len(requests) - made
        return Trial.of(stage, layers, len(requests), summary, perplexity, refused, perf_counter() - start)

    def _edit(self, editor: Editor, ledger: EditLedger, requests: Sequence[EditRequest]) -> int:
        """Make edits; return how many were made."""
        name = getattr(self.adapter.model, "name_or_path", "")
        session = EditSession(ledger, editor, name, self.base_hash, self.on_conflict, "skip")
        editor.prepare(ledger, self.tokenizer, self.statistics, self.status, self.progress)
        session.begin()
        for index, request in enumerate(requests):
            first = index - index % self.window
            proposal = session.propose([request], requests[first : first + self.window])
            if proposal is not None:
                session.apply(proposal)
        return len(ledger.history.made)

    def _measure_before(self, requests: Sequence[EditRequest]) -> tuple[dict[str, EditResult], float]:
        """Return results and perplexity on the unedited model, each measured once."""
        missing = [request for request in requests if request.id not in self._before]
        if missing:
            self.status("measuring the unedited model")
            self._before |= {r.id: r for r in evaluate_edits(self.adapter, self.tokenizer, missing)}
        if self._perplexity is None:
            self._perplexity = measure_perplexity(self.adapter, self.tokenizer, self.texts)["mean"]
        return self._before, self._perplexity
