"""What a method must offer to edit a stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lit_edit.data.request import EditRequest
from lit_edit.errors import ArgumentError
from lit_edit.files.interrupts import deferred_interrupts
from lit_edit.ledger.edit_ledger import Change, EditLedger, LayerUpdate, LedgerEntry, RecordedFacts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from lit_edit.models.adapter import ModelAdapter
    from lit_edit.models.memory import Memory
    from lit_edit.stats.second_moment import KeyStatistics

Status = Callable[[str], None]
"""Receives a line about what is going on, for a progress bar."""


def silent(message: str) -> None:
    """Receive status lines and show them to nobody."""


@dataclass(frozen=True)
class Proposal:
    """What an editor wants written for some requests. Making it reads the model and changes nothing.

    Attributes:
        requests: The edits.
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


class Editor(ABC):
    """A method: requests in, updates out. It knows neither Lightning nor files.

    Attributes:
        about: What the method is, for people.
    """

    about: ClassVar[EditorInfo]

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

    @abstractmethod
    def prepare(
        self,
        ledger: EditLedger,
        tokenizer: PreTrainedTokenizerBase,
        statistics: KeyStatistics,
        status: Status = silent,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Compute what is needed once, before the first edit, on the original weights."""

    @abstractmethod
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

    def similar(self, requests: Sequence[EditRequest], window: Sequence[EditRequest]) -> list[list[tuple[int, float]]]:
        """Return, per request, the numbers of edits that hold and are most like it, with how much (1: the same)."""
        return [[] for _ in requests]

    def replay(self, change: Change, entries: Sequence[LedgerEntry], old: Sequence[RecordedFacts]) -> Proposal | None:
        """Do again what is on record, bit for bit, without fitting anything.

        Args:
            change: What was done, with its tensors.
            entries: The edits that were made.
            old: The facts, as they were before, of all edits that are removed, restored or rewritten.

        Returns:
            ``None`` if this editor must work it out anew.
        """
        return None

    def retract(self, facts: Sequence[RecordedFacts], reason: str = "", exact: bool = False) -> Proposal:
        """Work out the updates without some edits.

        Args:
            facts: Those of the edits.
            reason: Why, for people.
            exact: Make the later edits again, as if these had never been; needed where :attr:`exact_undo` does not
                hold, and takes longer.

        Raises:
            ArgumentError: If this editor cannot take edits out.
        """
        raise ArgumentError(f"{type(self).__name__} cannot take edits out")

    def reinstate(self, facts: Sequence[RecordedFacts]) -> Proposal:
        """Work out the updates with some edits that were taken out put back.

        Raises:
            ArgumentError: If this editor cannot do that.
        """
        raise ArgumentError(f"{type(self).__name__} cannot put edits back")

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
        return {"editor": type(self).__name__}

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

    @abstractmethod
    def check_state(self, state: Mapping[str, Any], layers: Sequence[int]) -> None:
        """Raise :class:`lit_edit.errors.ArgumentError` if a saved state is not one of this editor on these layers."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on: tensors and primitives."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict` on a prepared editor."""


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


def column_norms(matrix: Tensor) -> list[float]:
    """Return the Euclidean norms of the columns."""
    return [float(value) for value in matrix.norm(dim=0)]
