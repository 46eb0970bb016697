"""Which edits were made, which of them hold, and where their facts are recorded: what a journal's records add up to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lit_edit.ledger.journal import JournalError, Record


@dataclass(frozen=True)
class LedgerEntry:
    """What is on record about one edit; numbers and text only.

    Attributes:
        id: The request's id.
        subject: Its subject.
        prompt: Its prompt, filled.
        target_new: The object that was written.
        facts: Numbers from the making: probability and loss of the target, norms, steps.
        request: The whole request, so that it can be measured again without the data it came from.
        number: 1, 2, 3 ... in the order of making; given by the ledger and never used again.
    """

    id: str
    subject: str
    prompt: str
    target_new: str
    facts: Mapping[str, float] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)
    number: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return what a reader of lists wants: text, and the numbers beside it."""
        return {
            "id": self.id,
            "subject": self.subject,
            "prompt": self.prompt,
            "target_new": self.target_new,
            **{name: float(value) for name, value in self.facts.items()},
        }

    def as_record(self) -> Record:
        """Return everything as primitives."""
        facts = {name: float(value) for name, value in self.facts.items()}
        return {**vars(self), "facts": facts, "request": dict(self.request)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> LedgerEntry:
        """Restore :meth:`as_record`."""
        return cls(**record)

    @property
    def asked(self) -> tuple[str, str, str, str]:
        """What tells edits apart."""
        return self.id, self.prompt, self.subject, self.target_new


class EditHistory:
    """The edits of a ledger: made one after another, perhaps taken out and put back.

    Attributes:
        made: Every edit ever made, in order.
        undone: Why an edit holds no longer, by its number.
        refused: Edits that were not made: id and reason.
        handled: Ids of the edits of the present stream that were made or refused, in order.
        carried: How many edits were made before the present stream began.
    """

    def __init__(self) -> None:
        self.made: list[LedgerEntry] = []
        self.undone: dict[int, str] = {}
        self.refused: list[tuple[str, str]] = []
        self.handled: list[str] = []
        self.carried = 0
        self._places: dict[int, tuple[int, int]] = {}
        self._by_text: dict[tuple[str, str], list[int]] = {}
        self._live: list[LedgerEntry] | None = None

    @property
    def live(self) -> list[LedgerEntry]:
        """The edits that hold, in the order of making."""
        if self._live is None:
            self._live = [entry for entry in self.made if entry.number not in self.undone]
        return self._live

    def entry(self, number: int) -> LedgerEntry:
        """Return an edit by its number.

        Raises:
            JournalError: If there is none.
        """
        if not 1 <= number <= len(self.made):
            there = f"1 to {len(self.made)}" if self.made else "none"
            raise JournalError(f"there is no edit {number}; the edits of this ledger are {there}")
        return self.made[number - 1]

    def place(self, number: int) -> tuple[int, int]:
        """Return the record that holds an edit's facts, and their column in it.

        Raises:
            JournalError: If its facts are not recorded.
        """
        if number not in self._places:
            raise JournalError(
                f"edit {number} ({self.entry(number).prompt!r}) has no keys on record, so it cannot be taken out by "
                "itself. Run the stream again without it"
            )
        return self._places[number]

    def beside(self, number: int) -> list[int]:
        """Return the numbers of all edits whose facts stand in the same record."""
        record = self.place(number)[0]
        return [other for other, (at, _) in self._places.items() if at == record]

    def same(self, subject: str, prompt: str) -> list[int]:
        """Return the edits that hold and are of the same fact: same subject and prompt, but for case and space."""
        return [n for n in self._by_text.get(fact_name(subject, prompt), ()) if n not in self.undone]

    def number(self, entries: Sequence[LedgerEntry]) -> tuple[LedgerEntry, ...]:
        """Return new edits with the numbers that they will have."""
        return tuple(replace(entry, number=len(self.made) + i) for i, entry in enumerate(entries, 1))

    def check(self, record: Record) -> None:
        """Raise :class:`JournalError` if a record takes out what is out or puts back what is in."""
        for number in [*record.get("removed", ()), *record.get("rewritten", ())]:
            entry = self.entry(number)
            if number in self.undone:
                raise JournalError(f"edit {number} ({entry.prompt!r}) is not in the model: {self.undone[number]}")
        for number in record.get("restored", ()):
            if self.entry(number).number not in self.undone:
                raise JournalError(f"edit {number} ({self.entry(number).prompt!r}) is in the model already")

    def apply(self, record: Record, index: int) -> None:
        """Take a record in.

        Args:
            record: What was done.
            index: Its place in the journal.
        """
        kind = record["kind"]
        if kind == "begin":
            self.handled, self.carried = [], len(self.made)
        elif kind == "refused":
            self.refused += [(name, record["reason"]) for name in record["ids"]]
            self.handled += record["ids"]
        entries = [LedgerEntry.from_record(entry) for entry in record.get("entries", ())]
        self._add(entries)
        if kind == "edit":
            self.handled += [entry.id for entry in entries]
        reason = record.get("reason") or "undone"
        self.undone |= dict.fromkeys(record.get("removed", ()), reason)
        for number in record.get("restored", ()):
            del self.undone[number]
        if record.get("facts"):
            numbers = [*(entry.number for entry in entries), *record.get("rewritten", ())]
            self._places |= {number: (index, column) for column, number in enumerate(numbers)}
        self._live = None

    def _add(self, entries: Sequence[LedgerEntry]) -> None:
        self.made += entries
        for entry in entries:
            self._by_text.setdefault(fact_name(entry.subject, entry.prompt), []).append(entry.number)

    @classmethod
    def of(cls, records: Sequence[Record]) -> EditHistory:
        """Return what the records of a journal add up to."""
        history = cls()
        for index, record in enumerate(records):
            history.apply(record, index)
        return history

    @classmethod
    def listing(cls, entries: Sequence[LedgerEntry]) -> EditHistory:
        """Return a history of edits that hold, of which nothing else is known."""
        history = cls()
        history._add([replace(entry, number=number) for number, entry in enumerate(entries, 1)])
        return history

    def state_dict(self) -> dict[str, Any]:
        """Return everything as primitives."""
        return {
            "made": [entry.as_record() for entry in self.made],
            "undone": [[number, reason] for number, reason in self.undone.items()],
            "refused": [list(pair) for pair in self.refused],
            "handled": list(self.handled),
            "carried": self.carried,
            "places": [[number, *place] for number, place in self._places.items()],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> EditHistory:
        """Restore :meth:`state_dict`."""
        history = cls()
        history._add([LedgerEntry.from_record(entry) for entry in state["made"]])
        history.undone = dict(state["undone"])
        history.refused = [(name, reason) for name, reason in state["refused"]]
        history.handled, history.carried = list(state["handled"]), state["carried"]
        history._places = {number: (record, column) for number, record, column in state["places"]}
        return history


def fact_name(subject: str, prompt: str) -> tuple[str, str]:
    """Return what is equal for edits of the same fact: subject and filled prompt, but for case and space.

    Example:
        >>> fact_name("Italy", "The capital  of Italy is") == fact_name("ITALY", "the capital of italy is ")
        True
    """
    return " ".join(subject.casefold().split()), " ".join(prompt.casefold().split())


def has_end(records: Iterable[Record]) -> bool:
    """Tell whether a run has come to its end, and has not been gone on with since (with more data).

    Example:
        >>> has_end([{"kind": "end"}, {"kind": "undo"}]), has_end([{"kind": "end"}, {"kind": "edit"}])
        (True, False)
    """
    ended = False
    for record in records:
        if record["kind"] == "end":
            ended = True
        elif record["kind"] in ("begin", "edit", "refused") and record.get("origin") not in ("user", "guard"):
            ended = False
    return ended
