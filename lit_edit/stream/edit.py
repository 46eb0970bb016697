"""Editing in one call, without a Trainer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_edit.data.formats import read_record
from lit_edit.data.request import DataError, EditRequest
from lit_edit.editors.base import Editor
from lit_edit.editors.closed_form.d4s import D4S
from lit_edit.errors import ArgumentError
from lit_edit.ledger.edit_ledger import EditLedger
from lit_edit.ledger.journal import JournalError
from lit_edit.metrics.evaluation import Summary, evaluate_edits, summarise
from lit_edit.models.adapter import ModelAdapter
from lit_edit.stats.second_moment import KeyStatistics, weights_hash
from lit_edit.stream.conflicts import ConflictPolicy
from lit_edit.stream.session import EditSession

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What a call of :func:`edit` did.

    Attributes:
        ledger: Original weights and committed edits; ``ledger.restore_base()`` takes everything back.
        base: Metrics before.
        final: Metrics after all edits.
        session: Made the edits, and can make more, take them out, and put them back.
    """

    ledger: EditLedger
    base: Summary
    final: Summary
    session: EditSession

    @property
    def success(self) -> bool:
        """Whether the model says every new object."""
        return self.final["efficacy"]["accuracy"] == 1.0

    def undo(self, *ids: str, exact: bool = False) -> None:
        """Take edits out of the model again.

        Args:
            *ids: Of their requests; ``#1``, ``#2`` ... where none were given.
            exact: Make the later edits again, as if these had never been.

        Raises:
            JournalError: If there is no such edit in the model.
        """
        self.session.undo(self._numbers(ids, hold=True), exact=exact)

    def redo(self, *ids: str) -> None:
        """Put edits that were taken out back into the model."""
        self.session.redo(self._numbers(ids, hold=False))

    def _numbers(self, ids: Sequence[str], hold: bool) -> list[int]:
        history = self.ledger.history
        numbers = {e.id: e.number for e in history.made if (e.number not in history.undone) == hold}
        if unknown := [name for name in ids if name not in numbers]:
            state = "in the model" if hold else "taken out"
            raise JournalError(
                f"no edit {unknown[0]!r} is {state}; there are {', '.join(map(repr, numbers)) or 'none'}"
            )
        return [numbers[name] for name in ids]


def edit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest | Mapping[str, Any]],
    editor: Editor | None = None,
    statistics: KeyStatistics | None = None,
    window: int = 16,
    on_conflict: ConflictPolicy = "replace",
) -> tuple[PreTrainedModel, Outcome]:
    """Edit facts in a model, in place, one after another.

    Args:
        model: A causal language model.
        tokenizer: Its (fast) tokenizer.
        requests: The facts: requests, or mappings with ``prompt``, ``subject`` and ``target_new``.
        editor: The method; D4S by default.
        statistics: Where the second moments of the keys come from; by default text that the model samples, kept in the
            cache.
        window: Facts whose targets are fitted together.
        on_conflict: What to do about a request of a fact that an earlier one is of: ``replace``, ``average``, or
            ``refuse``.

    Returns:
        The same model, edited, and what was done. Editors that keep their edits beside the weights (GRACE, WISE, IKE,
        SERAC) leave the model as it was: ``with outcome.ledger.adapter.patched(): model(...)`` computes with the edits
        of the first two.

    Raises:
        DataError: If a request is broken; names its number. On any error the model is as it was.
        ArgumentError: If ``window`` is below 1.
    """
    if window < 1:
        raise ArgumentError(f"window must be at least 1, got {window}")
    parsed: list[EditRequest] = []
    for number, request in enumerate(requests, 1):
        try:
            parsed += [request] if isinstance(request, EditRequest) else read_record(request, number)
        except DataError as error:
            raise DataError(f"request {number}: {error}") from None
    ids = [request.id for request in parsed]
    if not parsed or len(set(ids)) < len(ids):
        raise DataError("there are no requests" if not parsed else "two requests have the same id")
    editor = D4S() if editor is None else editor
    model.eval()
    adapter = ModelAdapter(model)
    ledger = EditLedger(adapter, editor.resolve_layers(adapter))
    session = EditSession(ledger, editor, getattr(model, "name_or_path", ""), weights_hash(model), on_conflict)
    editor.prepare(ledger, tokenizer, statistics or KeyStatistics())
    session.begin()
    before = {result.id: result for result in evaluate_edits(adapter, tokenizer, parsed)}
    try:
        for index, request in enumerate(parsed):
            first = index - index % window
            proposal = session.propose([request], parsed[first : first + window])
            if proposal is not None:
                session.apply(proposal)
        after = evaluate_edits(adapter, tokenizer, parsed)
    except BaseException:  # nobody would hold the ledger that could take the first edits back
        ledger.restore_base()
        raise
    if adapter.memory is not None:
        log.warning(
            "%s keeps its edits beside the weights: the model itself is as it was (see outcome.ledger.adapter.patched)",
            type(editor).__name__,
        )
    return model, Outcome(ledger, summarise(before.values(), before), summarise(after, before), session)
