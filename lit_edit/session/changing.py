"""The part of a session that changes the model: edits, undo, redo, and weights that somebody else has written."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lit_edit.data.formats import read_record
from lit_edit.data.request import DataError, EditRequest
from lit_edit.editors.base import Editor
from lit_edit.errors import ArgumentError, counted
from lit_edit.ledger.edit_ledger import EditLedger
from lit_edit.ledger.history import has_end
from lit_edit.ledger.journal import Journal, JournalError
from lit_edit.ledger.ownership import WeightsChangedError, owner_of
from lit_edit.metrics.evaluation import EditResult, Summary, evaluate_edits, summarise
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.described import check_if_new
from lit_edit.models.language_model import LanguageModel
from lit_edit.session.shown import Shown
from lit_edit.stats.second_moment import KeyStatistics, weights_hash
from lit_edit.stream.conflicts import ConflictPolicy
from lit_edit.stream.session import EditSession, RefusalPolicy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from typing_extensions import Self

log = logging.getLogger(__name__)

Requests = EditRequest | Mapping[str, Any] | Iterable[EditRequest | Mapping[str, Any]]


class Changing:
    """A model, its ledger and its editor, and what changes it.

    Args:
        model: A causal language model.
        tokenizer: Its (fast) tokenizer.
        editor: The method.
        statistics: Where the second moments of the keys come from.
        language_model: What the model is called and how it is loaded, for exports and saved sessions.
        on_conflict: What to do about an edit of a fact that an earlier one is of.
        on_refused: What to do about an edit that must not be written.
        progress: Whether bars are shown.
        adopt: Take the weights for the original ones whatever they are.
        journal: Goes on in a journal, which may hold edits already.

    Attributes:
        ledger: The original weights and the edits.
        results: What was measured, by stage (``base``, ``immediate``, ``final``) and id.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        editor: Editor,
        statistics: KeyStatistics,
        language_model: LanguageModel,
        on_conflict: ConflictPolicy = "replace",
        on_refused: RefusalPolicy = "stop",
        progress: bool = True,
        adopt: bool = False,
        journal: Journal | None = None,
    ) -> None:
        self.model, self.tokenizer, self.editor, self.statistics = model.eval(), tokenizer, editor, statistics
        self.language_model, self.progress = language_model, progress
        self.on_conflict, self.on_refused = on_conflict, on_refused
        self.folder: Path | None = None
        self.held = ExitStack()  # what is let go at the end: the lock of a folder
        self._begin(journal, adopt)

    def _begin(self, journal: Journal | None = None, adopt: bool = False) -> None:
        """Look at the model as it is, and begin with nothing edited."""
        self.adapter = ModelAdapter(self.model, self.language_model.arch, products=self.language_model.products)
        check_if_new(self.adapter)
        self.ledger = EditLedger(self.adapter, self.editor.resolve_layers(self.adapter), journal, adopt)
        owner = owner_of(self.model)
        assert owner is not None  # noqa: S101 - for the type checker: the ledger has just claimed the model
        owner.holder = self
        self.results: dict[str, dict[str, EditResult]] = {"base": {}, "immediate": {}, "final": {}}
        self._engine: EditSession | None = None
        self._measured_at: tuple[int, ...] | None = None

    def _ready(self, shown: Shown) -> EditSession:
        """Return the engine; prepares the editor when it is needed for the first time, on the original weights."""
        if self._engine is None:
            base_hash = weights_hash(self.ledger.adapter.model, self.ledger.base)
            name = self.language_model.name
            engine = EditSession(self.ledger, self.editor, name, base_hash, self.on_conflict, self.on_refused)
            engine.pin_kernels()
            self.editor.prepare(self.ledger, self.tokenizer, self.statistics, shown.status, shown.count)
            engine.status = shown.status
            engine.begin()
            engine.repeat_all()
            self._engine = engine
        self._engine.status = shown.status
        self._engine.on_conflict, self._engine.on_refused = self.on_conflict, self.on_refused
        return self._engine

    def use(self, editor: Editor) -> None:
        """Go on with another editor, before the first edit.

        Raises:
            ArgumentError: If edits were made.
        """
        if self.ledger.made:
            raise ArgumentError("the editor cannot be changed while edits are on record: session.reset() first")
        self.editor = editor
        self._begin()

    def reset(self) -> None:
        """Put the original weights back and forget all edits."""
        self.close()
        self.ledger.verify(thorough=True)
        self.ledger.restore_base()
        self._begin()

    @property
    def base_hash(self) -> str:
        """Hash of the original weights."""
        return self._ready(Shown(False, 0, "")).base_hash

    def __repr__(self) -> str:
        history = self.ledger.history
        made = f"{counted(len(history.made), 'edit')} made, {len(history.live)} in the model"
        return f"<lit-edit session: {type(self.editor).__name__} on {self.language_model.name}, {made}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder that the session was saved in; the model keeps its edits, and the session can go on."""
        if self.folder is not None:
            self._end()
            journal = Journal()
            self.ledger.journal.copy_to(journal)
            self.ledger.journal, self.folder = journal, None
        self.held.close()

    def _end(self) -> None:
        """Put on record that what was asked for has been done: a folder without that is of work that was cut."""
        if not has_end(self.ledger.journal.records):
            self.ledger.note({"kind": "end"})

    # ---- editing ----------------------------------------------------------------------------------------------------

    def edit(self, requests: Requests, window: int = 16) -> Outcome:
        """Edit facts in the model, in place, one after another.

        Args:
            requests: The facts: requests, or mappings with ``prompt``, ``subject`` and ``target_new``; or one of them.
            window: Facts whose targets are fitted together.

        Returns:
            What was done.

        Raises:
            DataError: If a request is broken; names its number. On any error the model is as it was before the call
                (in a session that is kept in a folder, the edits made so far stay: they are on record).
            ArgumentError: If ``window`` is below 1.
            WeightsChangedError: If somebody else has written the model's weights.
        """
        if window < 1:
            raise ArgumentError(f"window must be at least 1, got {window}")
        parsed = self._parse(requests)
        self.ledger.verify(thorough=True)
        with Shown(self.progress, len(parsed), "edit") as shown:
            engine = self._ready(shown)
            position = self.ledger.position
            shown.status("measuring the unedited model")
            self._measure("base", parsed, self.ledger.original())
            made = len(self.ledger.history.made)
            try:
                for index, request in enumerate(parsed):
                    first = index - index % window
                    proposal = engine.propose([request], parsed[first : first + window])
                    if proposal is not None:
                        engine.apply(proposal)
                    shown.step()
                shown.status("measuring the edits")
                after = self._measure("final", parsed, self.adapter)
                self.results["immediate"] |= {result.id: result for result in after}
            except BaseException as error:
                self._take_back(position, error)
                raise
        if self.adapter.memory is not None:
            log.warning(
                "%s keeps its edits beside the weights: the model itself is as it was (see session.adapter.patched)",
                type(self.editor).__name__,
            )
        before = {request.id: self.results["base"][request.id] for request in parsed}
        numbers = tuple(entry.number for entry in self.ledger.history.made[made:])
        return Outcome(self, numbers, summarise(before.values(), before), summarise(after, before))

    def _parse(self, requests: Requests) -> list[EditRequest]:
        if isinstance(requests, (EditRequest, Mapping)):
            requests = [requests]
        if isinstance(requests, str) or not isinstance(requests, Iterable):
            raise DataError(
                f"requests must be facts (EditRequest, or mappings with prompt, subject and target_new), got "
                f"{type(requests).__name__}; a file of them is read by lit_edit.data.sources.load_requests"
            )
        parsed: list[EditRequest] = []
        earlier = {entry.id: entry.number for entry in self.ledger.history.made}
        earlier |= dict.fromkeys((name for name, _ in self.ledger.history.refused), 0)
        for number, request in enumerate(requests, 1):
            try:
                parsed += [request] if isinstance(request, EditRequest) else read_record(request, len(earlier) + number)
            except DataError as error:
                raise DataError(f"request {number}: {error}") from None
        ids = [request.id for request in parsed]
        if not parsed or len(set(ids)) < len(ids):
            raise DataError("there are no requests" if not parsed else "two requests have the same id")
        if used := [name for name in ids if name in earlier]:
            raise DataError(
                f"the id {used[0]!r} is that of an edit of this model already; give another one, or leave ids out "
                "(redo puts edits back that were taken out)"
            )
        return parsed

    def _take_back(self, position: int, error: BaseException) -> None:
        """Undo what a call has done that failed: the journal up to there is done once more, which fits nothing."""
        if self.ledger.position == position or isinstance(error, WeightsChangedError):
            return
        if self.folder is not None:
            log.warning("the call failed; the edits that it has made are on record in %s and stay", self.folder)
            return
        journal = Journal()
        self.ledger.journal.copy_to(journal, position)
        self.ledger.restore_base()
        self.ledger.take_up(journal)
        self._engine, self._measured_at = None, None
        self._ready(Shown(False, 0, ""))

    def undo(self, *edits: int | str, exact: bool = False) -> None:
        """Take edits out of the model again.

        Args:
            *edits: Their numbers, as :meth:`log` has them, or the ids of their requests.
            exact: Make the later edits again, as if these had never been.

        Raises:
            JournalError: If there is no such edit in the model.
            WeightsChangedError: If somebody else has written the model's weights.
        """
        self._change(edits, hold=True, exact=exact)

    def redo(self, *edits: int | str) -> None:
        """Put edits that were taken out back into the model; arguments and errors as of :meth:`undo`."""
        self._change(edits, hold=False)

    def _change(self, edits: Sequence[int | str], hold: bool, exact: bool = False) -> None:
        numbers = self._numbers(edits, hold)
        self.ledger.verify(thorough=True)
        with Shown(self.progress, 1, "change") as shown:
            engine = self._ready(shown)
            if hold:
                engine.undo(numbers, exact=exact)
            else:
                engine.redo(numbers)
        self._measured_at = None

    def _numbers(self, edits: Sequence[int | str], hold: bool) -> list[int]:
        history = self.ledger.history
        numbers = {e.id: e.number for e in history.made if (e.number not in history.undone) == hold}
        found = []
        for edit in edits:
            number = edit if isinstance(edit, int) and not isinstance(edit, bool) else numbers.get(str(edit))
            if number is None or number not in numbers.values():
                state = "in the model" if hold else "taken out"
                there = ", ".join(f"{number} ({name!r})" for name, number in numbers.items())
                raise JournalError(f"no edit {edit!r} is {state}; there are {there or 'none'}")
            found.append(number)
        return found

    # ---- weights that somebody else has written ----------------------------------------------------------------------

    def adopt(self) -> None:
        """Take the model's weights as they are for the original ones: the edits become part of them, and history ends.

        Key statistics are counted anew, on these weights, when the next edit is made.
        """
        self.close()
        self._begin(adopt=True)

    def restore(self) -> None:
        """Write the edited layers back as the ledger left them, whoever has written them since.

        Raises:
            WeightsChangedError: If other weights were changed as well, of which no copy is kept.
        """
        self.ledger.rewrite()

    def _measure(self, stage: str, requests: Sequence[EditRequest], adapter: ModelAdapter) -> list[EditResult]:
        known = self.results[stage]
        wanted = [r for r in requests if r.id not in known] if stage == "base" else list(requests)
        known |= {result.id: result for result in evaluate_edits(adapter, self.tokenizer, wanted)} if wanted else {}
        return [known[request.id] for request in requests]


@dataclass(frozen=True)
class Outcome:
    """What a call that edits did.

    Attributes:
        session: The :class:`~lit_edit.session.session.Session`; it goes on: more edits, undo, redo, log, export.
        numbers: Of the edits that were made.
        base: Metrics of these facts before.
        final: Metrics of these facts after.
    """

    session: Any
    numbers: tuple[int, ...]
    base: Summary
    final: Summary

    @property
    def ledger(self) -> EditLedger:
        """Original weights and committed edits; ``ledger.restore_base()`` takes everything back."""
        return self.session.ledger

    @property
    def success(self) -> bool:
        """Whether the model says every new object."""
        return self.final["efficacy"]["accuracy"] == 1.0

    def undo(self, *edits: int | str, exact: bool = False) -> None:
        """Take edits out of the model again; see :meth:`Changing.undo`."""
        self.session.undo(*edits, exact=exact)

    def redo(self, *edits: int | str) -> None:
        """Put edits that were taken out back into the model."""
        self.session.redo(*edits)
