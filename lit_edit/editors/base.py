"""What a method must offer to edit a stream."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from torch import Tensor

from lit_edit.data.request import EditRequest
from lit_edit.errors import ArgumentError, shorten
from lit_edit.files.interrupts import deferred_interrupts
from lit_edit.ledger.edit_ledger import Change, EditLedger, LayerUpdate, LedgerEntry, RecordedFacts
from lit_edit.text.tokens import check_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

    from lit_edit.models.adapter import ModelAdapter
    from lit_edit.models.memory import Memory
    from lit_edit.stats.second_moment import KeyStatistics

Status: TypeAlias = Callable[[str], None]
"""Receives a line about what is going on, for a progress bar."""
Deltas: TypeAlias = dict[int, Tensor]
"""Updates by layer, each ``(d_out, d_in)``."""
Moments: TypeAlias = Callable[[], dict[int, Tensor]]
"""Returns the second moments of the keys of ordinary text, by layer, ``(d_in, d_in)``."""


def silent(message: str) -> None:
    """Receive status lines and show them to nobody."""


@dataclass(frozen=True)
class Proposal:
    """What an editor wants written for some requests. Making it reads the model and changes nothing.

    Attributes:
        updates: One per layer.
        entries: For the ledger, one per request.
        pending: What :meth:`Editor.accept` takes into the editor's state after the commit.
        seconds: Time spent, by phase.
        change: What the commit does beside making the edits, and what is recorded of it.
    """

    requests: tuple[EditRequest, ...]
    updates: tuple[LayerUpdate, ...]
    entries: tuple[LedgerEntry, ...]
    pending: Any = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    change: Change = field(default_factory=Change)


class Stopwatch:
    """Adds up seconds by phase, in a dictionary of its own or a given one.

    Example:
        >>> watch = Stopwatch()
        >>> with watch("solve"):
        ...     pass
        >>> list(watch.seconds)
        ['solve']
    """

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.seconds: dict[str, float] = {} if seconds is None else seconds

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time the block as part of ``phase``."""
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + perf_counter() - start


@dataclass(frozen=True)
class Step:
    """What an editor is asked for; the fields are those of :meth:`Editor.propose`, and ``watch`` takes the times."""

    requests: tuple[EditRequest, ...]
    window: tuple[EditRequest, ...]
    status: Status
    replaced: tuple[RecordedFacts, ...]
    watch: Stopwatch

    def change(self, tensors: Mapping[str, Tensor]) -> Change:
        """Return what the commit does beside making the edits, with what is recorded of it."""
        return Change(removed=numbers_of(self.replaced), tensors=tensors)


@dataclass(frozen=True)
class EditorInfo:
    """What a user wants to know of a method before choosing it; ``lit-edit editors`` shows it.

    Attributes:
        title: The method's name in the literature.
        paper: Short title and arXiv number.
        kind: What it does with the model.
        cost: Of an edit, in words.
        state: What is carried from edit to edit, and how it grows.
        batch: Whether several edits can be made in one step.
        undo: How edits are taken out: ``exact`` (as if they had never been), ``approximate``, or ``no``.
        lora: Whether a run can be exported as a LoRA adapter of a rank that grows with the edits, not the layer.
        devices: Whether several processes share the work.
        lacks: What it cannot do by its nature, and what it asks for in return.
    """

    title: str
    paper: str
    kind: Literal[
        "closed form", "fine-tuning", "adapter", "gradient, closed form", "hyper-network", "memory", "in context"
    ]
    cost: str
    state: str
    batch: bool = True
    undo: Literal["exact", "approximate", "no"] = "no"
    lora: bool = False
    devices: bool = False
    lacks: str = ""


def commit_proposal(ledger: EditLedger, editor: Editor, proposal: Proposal) -> tuple[LedgerEntry, ...]:
    """Write a proposal and take it into the editor's state: both or neither.

    Raises:
        EditRefusedError: If it must not be written; nothing has changed then.
    """
    with deferred_interrupts():  # a Ctrl-C in between would leave weights and editor apart
        entries = ledger.commit(proposal.updates, proposal.entries, proposal.change)
        editor.accept(replace(proposal, entries=entries))
    return entries


def _remembering(init: Callable[..., None]) -> Callable[..., None]:
    """Return a constructor that notes what it was given."""

    @functools.wraps(init)
    def wrapped(self: Editor, *args: Any, **kwargs: Any) -> None:
        if "init_args" not in vars(self):  # not by the class above, which is called by this one
            given = inspect.signature(init).bind_partial(self, *args)
            self.init_args = {**dict(list(given.arguments.items())[1:]), **kwargs}
        init(self, *args, **kwargs)

    return wrapped


class Editor(ABC):
    """A method: requests in, updates out. It knows neither Lightning nor files.

    Attributes:
        about: What the method is, for people.
        depends_on: Names, with spaces between, of the attributes that a result depends on, primitives, beside those
            that the classes above name.
        built_on: What each edit of a method without exact undo has been done to the result of the earlier ones.
        ledger: Holds the model and its original weights, once prepared.
        tokenizer: Its tokenizer.
        init_args: What it was made with, by name, so that it can be described in a file.
    """

    about: ClassVar[EditorInfo]
    depends_on: ClassVar[str] = ""
    built_on: ClassVar[str] = "was made on the weights"

    ledger: EditLedger
    tokenizer: PreTrainedTokenizerBase
    init_args: Mapping[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _remembering(cls.__init__)  # type: ignore[method-assign]

    @property
    def one_by_one(self) -> bool:
        """Whether the method is defined for a single edit per step."""
        about: EditorInfo | None = getattr(type(self), "about", None)
        return about is not None and not about.batch

    @property
    def exact_undo(self) -> bool:
        """Whether an edit that is taken out leaves what a stream without it would have made."""
        return False

    @abstractmethod
    def resolve_layers(self, adapter: ModelAdapter) -> tuple[int, ...]:
        """Return the layers this editor writes on this model, ascending."""

    def prepare(
        self,
        ledger: EditLedger,
        tokenizer: PreTrainedTokenizerBase,
        statistics: KeyStatistics | Mapping[int, Tensor],
        status: Status = silent,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Compute what is needed once, before the first edit, on the original weights, and forget earlier streams.

        Args:
            ledger: Holds the model and its original weights.
            tokenizer: A fast tokenizer.
            statistics: How to get the second moments of the keys, or the moments themselves by layer.
            status: Receives a line about what is going on.
            progress: Called with tokens read and tokens in all.
        """
        check_tokenizer(tokenizer)
        self.ledger, self.tokenizer = ledger, tokenizer

        def moments() -> dict[int, Tensor]:
            if isinstance(statistics, Mapping):
                return dict(statistics)
            status("key statistics")
            return statistics.compute(ledger.original(), tokenizer, ledger.layers, progress)

        self._begin(moments, status)

    @abstractmethod
    def _begin(self, moments: Moments, status: Status) -> None:
        """Do what a method does for :meth:`prepare`; ledger and tokenizer are there."""

    def propose(
        self,
        requests: Sequence[EditRequest],
        window: Sequence[EditRequest] = (),
        status: Status = silent,
        replaced: Sequence[RecordedFacts] = (),
    ) -> Proposal:
        """Work out the updates for some requests, without changing the model or what has been edited.

        An editor may keep what it has prepared for later edits of the window.

        Args:
            requests: The edits of this step.
            window: The edits of the window that this step lies in, itself included; an editor may prepare them
                together, and must arrive at the same result for the same window.
            status: Receives a line about what is going on.
            replaced: Earlier edits that are taken out in the same step, before these are made.
        """
        watch = Stopwatch()
        proposal = self._work_out(Step(tuple(requests), tuple(window), status, tuple(replaced), watch))
        return replace(proposal, requests=tuple(requests), seconds=watch.seconds)

    @abstractmethod
    def _work_out(self, step: Step) -> Proposal:
        """Do what a method does for :meth:`propose`, which adds the requests and the times."""

    def similar(self, requests: Sequence[EditRequest], window: Sequence[EditRequest]) -> list[list[tuple[int, float]]]:
        """Return, per request, the numbers of edits that hold and are most like it, with how much (1: the same)."""
        return [[] for _ in requests]

    def replay(self, change: Change, entries: Sequence[LedgerEntry], old: Sequence[RecordedFacts]) -> Proposal | None:
        """Do again what is on record, bit for bit, without fitting anything; ``None``: it must be worked out anew.

        Args:
            change: What was done, with its tensors.
            entries: The edits that were made.
            old: The facts, as they were before, of all edits that are removed, restored or rewritten.
        """
        return None

    def retract(self, facts: Sequence[RecordedFacts], reason: str = "", exact: bool = False) -> Proposal:
        """Work out the updates without some edits; the later ones stay as they are unless ``exact``.

        Args:
            facts: Those of the edits.
            reason: Why, for people.
            exact: Make the later edits again, as if these had never been; needed where :attr:`exact_undo` does not
                hold, and takes longer.

        Raises:
            ArgumentError: If this editor cannot take edits out, or not exactly.
        """
        if exact and not self.exact_undo:
            raise ArgumentError(
                f"{type(self).__name__} cannot make later edits again as if some had never been (exact): each "
                f"{self.built_on} that the earlier ones left. Leave exact out to take them out as they are, or run the "
                "stream again without them"
            )
        change = Change("undo", removed=tuple(sorted(numbers_of(facts))), reason=reason)
        proposal = self.replay(change, (), facts)
        if proposal is None:
            raise ArgumentError(f"{type(self).__name__} cannot take edits out")
        return proposal

    def reinstate(self, facts: Sequence[RecordedFacts]) -> Proposal:
        """Work out the updates with some edits put back; an :class:`ArgumentError` if this editor cannot do that."""
        proposal = self.replay(Change("redo", restored=numbers_of(facts)), (), facts)
        if proposal is None:
            raise ArgumentError(f"{type(self).__name__} cannot put edits back")
        return proposal

    def check_whole(self, adapter: ModelAdapter) -> None:
        """Raise :class:`ArgumentError` if each process holds a part of each layer, for methods that need whole ones."""
        if adapter.sharded:
            raise ArgumentError(
                f"{type(self).__name__} needs whole layers, and each process holds a part of them: use another "
                "strategy (trainer.strategy)"
            )

    def deviation(self, proposal: Proposal) -> float:
        """Estimate how far a retraction is from a stream without the edits, relative to the updates of later edits."""
        return 0.0

    def settings(self) -> dict[str, Any]:
        """Return, as primitives, all settings that a result depends on: a journal is continued with the same ones."""
        kinds = reversed(type(self).__mro__)
        names = [name for kind in kinds for name in vars(kind).get("depends_on", "").split()]
        return {"editor": type(self).__name__, **{name: getattr(self, name) for name in names}}

    def opening(self) -> dict[str, Any]:
        """Return, as primitives, what was drawn at random before the first edit; :meth:`reopen` puts it back."""
        return {}

    def reopen(self, opening: Mapping[str, Any]) -> None:  # noqa: B027 - most have drawn nothing
        """Go on with what an earlier process drew; called on a prepared editor."""

    def memory_after(self, proposal: Proposal) -> Memory | None:
        """Return what the model would compute with beside its weights; ``None``: as now."""
        return None

    @abstractmethod
    def accept(self, proposal: Proposal) -> None:
        """Take a committed proposal into the editor's state; must not fail."""

    def check_state(self, state: Mapping[str, Any], layers: Sequence[int]) -> None:
        """Raise :class:`lit_edit.errors.ArgumentError` if a saved state is not one of this editor on these layers."""
        if state.get("editor") != type(self).__name__:
            raise ArgumentError(
                f"the checkpoint was made by {state.get('editor', 'another editing method')}, this editor is "
                f"{type(self).__name__}; use the config that it was made with"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on: tensors and primitives."""
        return {"editor": type(self).__name__}

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict` on a prepared editor; an :class:`ArgumentError` if it is another editor's."""

    # ---- what methods share ------------------------------------------------------------------------------------------

    def _leaves_nothing(self, change: Change, entries: Sequence[LedgerEntry]) -> bool:
        """Tell whether no edit holds after a change: what taking them all out leaves of sums is rounding."""
        if entries or change.restored:
            return False
        return {entry.number for entry in self.ledger.entries} <= set(change.removed)

    def _updates(self, written: Mapping[int, Tensor]) -> tuple[LayerUpdate, ...]:
        """Return what is written, by layer, for the ledger."""
        return tuple(LayerUpdate(layer, self.ledger.names[layer], delta) for layer, delta in written.items())


def numbers_of(facts: Sequence[RecordedFacts]) -> tuple[int, ...]:
    """Return the numbers of some edits on record."""
    return tuple(number for recorded in facts for number in recorded.numbers)


def entry_of(request: EditRequest, facts: Mapping[str, float]) -> LedgerEntry:
    """Return what the ledger is to know of an edit."""
    return LedgerEntry(request.id, request.subject, request.text, request.target_new, dict(facts), request.as_dict())


def described(request: EditRequest) -> str:
    """Return an edit for an error message."""
    return f"{request.id!r} ({shorten(request.text)!r} -> {shorten(request.target_new)!r})"
