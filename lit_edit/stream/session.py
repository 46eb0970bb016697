"""An editor at work on a ledger: one transaction after another, each of them whole, on record, and repeatable.

What an earlier process has recorded and this one has not done yet is done again from the record, bit for bit and
without fitting anything; so a run that died goes on as if it had not.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, Literal

from lit_edit.data.request import ADDED_FIELDS, EditRequest
from lit_edit.editors.base import Editor, Proposal, Status, commit_proposal, silent
from lit_edit.errors import ArgumentError
from lit_edit.ledger.edit_ledger import Change, EditLedger, EditRefusedError, LedgerEntry, Origin, RecordedFacts
from lit_edit.ledger.journal import JournalError, Record
from lit_edit.models.adapter import ModelAdapter
from lit_edit.solvers.functional import FactsError
from lit_edit.stream.conflicts import ConflictPolicy, find_conflicts, superseded

log = logging.getLogger(__name__)

RefusalPolicy = Literal["stop", "skip"]

_FORMAT = 1  # of the journal
_HARMFUL = (FloatingPointError, EditRefusedError, FactsError)


class EditSession:
    """Makes edits, takes them out, and puts them back.

    Args:
        ledger: Writes the weights.
        editor: Works the updates out; prepared before :meth:`begin`.
        model_name: What the model is called, for the record.
        base_hash: Hash of its original weights.
        on_conflict: What to do about an edit of a fact that was edited before.
        on_refused: What to do about an edit that must not be written.

    Attributes:
        status: Receives a line about what is going on.
    """

    def __init__(
        self,
        ledger: EditLedger,
        editor: Editor,
        model_name: str,
        base_hash: str,
        on_conflict: ConflictPolicy = "replace",
        on_refused: RefusalPolicy = "stop",
    ) -> None:
        self.ledger, self.editor = ledger, editor
        self.model_name, self.base_hash = model_name, base_hash
        self.on_conflict, self.on_refused = on_conflict, on_refused
        self.status: Status = silent

    # ---- beginning and taking up --------------------------------------------------------------------------------

    def pin_kernels(self) -> None:
        """Multiply matrices as the process did that began the journal: the same round-off."""
        begun = self._begun()
        if begun is None:
            return
        kernels, here = begun["kernels"], self.ledger.adapter.kernels()
        self.ledger.adapter.pin_kernels(kernels)
        for name in ("threads", "device"):
            if kernels[name] != here[name]:
                log.warning(
                    "this run was made with %s %s and now has %s: it goes on, but not bit for bit",
                    name,
                    kernels[name],
                    here[name],
                )

    def begin(self) -> None:
        """Put the beginning of a stream on record; or check it, and do at once what came before this stream.

        Raises:
            ArgumentError: If the journal was begun with other weights or other settings of the editor.
        """
        records = self.ledger.journal.records
        begun, marks = self._begun(), [i for i, r in enumerate(records) if r["kind"] in ("begin", "continued")]
        if begun is not None:
            self._check(begun)
            self.editor.reopen(begun["opening"])
        while marks and self.ledger.position <= marks[-1]:
            self.status(f"taking up earlier edits: record {self.ledger.position + 1} of {marks[-1] + 1}")
            self.repeat()
        if not marks or records[marks[-1]]["kind"] == "continued":
            self.ledger.note(
                {
                    "kind": "begin",
                    "format": _FORMAT,
                    "version": version("lit-edit"),
                    "model": self.model_name,
                    "base_hash": self.base_hash,
                    "settings": self.editor.settings(),
                    "opening": self.editor.opening(),
                    "kernels": self.ledger.adapter.kernels(),
                }
            )

    def check(self) -> None:
        """Raise :class:`ArgumentError` if the journal was begun with other weights or settings than those at hand."""
        if (begun := self._begun()) is not None:
            self._check(begun)

    def _begun(self) -> Record | None:
        begun = [record for record in self.ledger.journal.records if record["kind"] == "begin"]
        return begun[-1] if begun else None

    def _check(self, begun: Record) -> None:
        if begun["format"] != _FORMAT:
            raise ArgumentError(f"the journal was written by another version of lit-edit ({begun['version']})")
        if begun["base_hash"] != self.base_hash:
            raise ArgumentError(
                f"the edits were made on other base weights than those of {self.model_name!r} (hash "
                f"{begun['base_hash']} against {self.base_hash}); load the model they were made with"
            )
        then, now = begun["settings"], self.editor.settings()
        if other := [name for name in {**then, **now} if then.get(name) != now.get(name)]:
            told = "; ".join(f"{name} {_short(then.get(name))}, now {_short(now.get(name))}" for name in other)
            raise ArgumentError(
                f"the edits were made with other settings ({told}): use the config that they were made with, or start "
                "a run of another name"
            )

    def repeat(self) -> None:
        """Do the next record of the journal again."""
        record = self.ledger.next_record()
        if record is None:
            raise JournalError("the journal holds nothing that has not been done")
        if record["kind"] in ("edit", "undo", "redo"):
            self.apply(self._recorded(record))
        else:
            self.ledger.note(record)

    def repeat_all(self) -> None:
        """Do everything on record that has not been done."""
        while self.ledger.ahead:
            self.status(f"taking up earlier edits: record {self.ledger.position + 1} of {len(self.ledger.journal)}")
            self.repeat()

    def _recorded(self, record: Record) -> Proposal:
        """Return the next record as a proposal."""
        change = Change(
            record["kind"],
            tuple(record["removed"]),
            tuple(record["restored"]),
            tuple(record["rewritten"]),
            self.ledger.next_tensors() if record["facts"] else {},
            record["origin"],
            record["reason"],
        )
        old = self.ledger.facts_of([*change.removed, *change.restored, *change.rewritten])
        proposal = self.editor.replay(change, [LedgerEntry.from_record(entry) for entry in record["entries"]], old)
        if proposal is None:
            raise ArgumentError(f"{type(self.editor).__name__} cannot take up a journal")
        return proposal

    # ---- making edits -------------------------------------------------------------------------------------------

    def propose(self, requests: Sequence[EditRequest], window: Sequence[EditRequest] = ()) -> Proposal | None:
        """Return what is to be written for one step: from the record if it was written before, else worked out.

        Args:
            requests: The edits of the step.
            window: The edits of the window that the step lies in.

        Returns:
            ``None`` if none of them is to be made.

        Raises:
            EditRefusedError: If an edit must not be written and the policy is to stop.
            JournalError: If the record goes on with something else.
        """
        self.repeat_between_steps()
        handled = set(self.ledger.history.handled)
        wanted = [request for request in requests if request.id not in handled]
        while (record := self.ledger.next_record()) is not None and record["kind"] == "refused":
            self.repeat()
            wanted = [request for request in wanted if request.id not in record["ids"]]
        if not wanted:
            return None
        if record is None:
            return self._work_out(wanted, window)
        recorded = [entry["id"] for entry in record.get("entries", ())]
        if record["kind"] != "edit" or recorded != [request.id for request in wanted]:
            raise JournalError(
                f"the journal goes on with {record['kind']} {', '.join(map(repr, recorded))}, the stream with "
                f"{', '.join(repr(request.id) for request in wanted)}: resume with the data it was made with"
            )
        for request, entry in zip(wanted, record["entries"], strict=True):
            check_request(request, entry["request"])
        return self._recorded(record)

    def repeat_between_steps(self) -> None:
        """Do again what was done between two steps, by hand or by a guard, and pass over the end of an earlier run."""
        while (record := self.ledger.next_record()) is not None:
            if record["kind"] != "end" and record.get("origin") not in ("user", "guard"):
                return
            self.repeat()

    def _work_out(self, requests: Sequence[EditRequest], window: Sequence[EditRequest]) -> Proposal | None:
        requests, replaced = self._without_conflicts(requests, window)
        if not requests:
            return None
        try:
            facts = self._facts_of(replaced)
            proposal = self.editor.propose(requests, window, self.status, facts)
            self._try(proposal)
        except _HARMFUL as error:
            if self.on_refused == "stop" and isinstance(error, FactsError):
                raise EditRefusedError(str(error)) from error
            if self.on_refused == "stop":
                raise
            return self._without_harmful(requests, window, str(error))
        for number, reason in replaced.items():
            earlier = self.ledger.history.entry(number)
            log.warning("edit %d (%r -> %r) is %s", number, earlier.prompt, earlier.target_new, reason)
        return replace(proposal, change=replace(proposal.change, reason="; ".join(replaced.values())))

    def _facts_of(self, replaced: Mapping[int, str]) -> list[RecordedFacts]:
        """Return what is on record about edits that are to be replaced; refuse where that is not enough."""
        try:
            return self.ledger.facts_of(list(replaced))
        except JournalError as error:
            raise EditRefusedError(
                f"{error}, so it cannot be replaced: set model.on_conflict to average, which leaves it in"
            ) from error

    def _try(self, proposal: Proposal) -> None:
        """Raise :class:`EditRefusedError` now, not at the commit, where skipping is the policy."""
        if self.on_refused == "skip":
            self.ledger.check(proposal.updates, proposal.entries)

    def _without_conflicts(
        self, requests: Sequence[EditRequest], window: Sequence[EditRequest]
    ) -> tuple[list[EditRequest], dict[int, str]]:
        """Return the edits to make, and the earlier ones that they replace, with reasons."""
        asked = {request.id: request for request in requests}
        refused = superseded(requests, self.on_conflict)
        requests = [request for request in requests if request.id not in refused]
        conflicts = find_conflicts(self.ledger.history, self.editor, requests, window, self.on_conflict)
        if self.on_conflict == "refuse":
            refused |= {name: found[0].reason for name, found in conflicts.items() if found}
            requests, conflicts = [request for request in requests if request.id not in refused], {}
        for name, reason in refused.items():
            self.refuse([asked[name]], reason)
        return requests, {conflict.number: conflict.reason for found in conflicts.values() for conflict in found}

    def _without_harmful(
        self, requests: Sequence[EditRequest], window: Sequence[EditRequest], reason: str
    ) -> Proposal | None:
        """Leave out what must not be written; of several edits each is tried without the others."""
        harmful = {requests[0].id: reason} if len(requests) == 1 else {}
        for request in requests if len(requests) > 1 else ():
            try:
                self._try(self.editor.propose([request], window, self.status))
            except _HARMFUL as error:
                harmful[request.id] = str(error)
        if not harmful:  # each alone would do, all together not
            harmful = {request.id: reason for request in requests}
        for request in requests:
            if request.id in harmful:
                self.refuse([request], harmful[request.id])
        rest = [request for request in requests if request.id not in harmful]
        return self._work_out(rest, window) if rest else None

    def refuse(self, requests: Sequence[EditRequest], reason: str) -> None:
        """Put on record that edits are not made."""
        ids, asked = [request.id for request in requests], [[r.text, r.target_new] for r in requests]
        log.warning("not made: edit %s: %s", ", ".join(map(repr, ids)), reason)
        self.ledger.note({"kind": "refused", "ids": ids, "asked": asked, "reason": reason})

    def preview(self, proposal: Proposal) -> ModelAdapter:
        """Return a view of the model as a proposal would make it."""
        view, memory = self.ledger.preview(proposal.updates), self.editor.memory_after(proposal)
        return view if memory is None else view.with_memory(memory)

    def apply(self, proposal: Proposal) -> tuple[LedgerEntry, ...]:
        """Commit a proposal and take it into the editor's state; see :func:`commit_proposal`."""
        return commit_proposal(self.ledger, self.editor, proposal)

    # ---- taking out and putting back ----------------------------------------------------------------------------

    def undo(
        self, numbers: Sequence[int], reason: str = "undone", exact: bool = False, origin: Origin = "user"
    ) -> Proposal:
        """Take committed edits out, as one transaction.

        Args:
            numbers: The edits, by number (:attr:`LedgerEntry.number`).
            reason: Why, for people.
            exact: Make all later edits again, as if these had never been. Where the editor's undo is exact already
                (``editor.exact_undo``) this changes nothing.
            origin: Who wants it.

        Returns:
            What was done.

        Raises:
            JournalError: If there is no such edit, or it does not hold.
        """
        self._check_numbers(numbers, hold=True)
        proposal = self.editor.retract(self.ledger.facts_of(numbers), reason, exact)
        return self._do(proposal, origin)

    def redo(self, numbers: Sequence[int], origin: Origin = "user") -> Proposal:
        """Put edits that were taken out back, as one transaction.

        Raises:
            JournalError: If there is no such edit, or it holds already.
        """
        self._check_numbers(numbers, hold=False)
        if self.on_conflict != "average":
            self._check_replaced(numbers)
        return self._do(self.editor.reinstate(self.ledger.facts_of(numbers)), origin)

    def _check_replaced(self, numbers: Sequence[int]) -> None:
        """Raise :class:`JournalError` if what has replaced an edit holds still: both would contradict each other."""
        history = self.ledger.history
        for number in numbers:
            by = [
                entry["number"]
                for record in self.ledger.journal.records
                if record["kind"] == "edit" and number in record["removed"]
                for entry in record["entries"]
            ]
            entry = history.entry(number)
            same = history.same(entry.subject, entry.prompt)
            holds = [n for n in [*same, *by] if n not in history.undone]
            if holds and ("replaced by" in history.undone[number] or same):
                raise JournalError(
                    f"edit {number} ({entry.prompt!r}) is of the same fact as edit {holds[0]}, which holds: take that "
                    f"out first (lit-edit undo --edit {holds[0]})"
                )

    def _do(self, proposal: Proposal, origin: Origin) -> Proposal:
        proposal = replace(proposal, change=replace(proposal.change, origin=origin))
        self.apply(proposal)
        return proposal

    def _check_numbers(self, numbers: Sequence[int], hold: bool) -> None:
        if not numbers:
            raise JournalError("no edits were named")
        self.ledger.history.check({"removed" if hold else "restored": list(numbers)})


def check_request(request: EditRequest, recorded: Mapping[str, Any]) -> None:
    """Raise :class:`JournalError` if an edit of the data is not the one that was made under its id."""
    now = request.as_dict()
    names = [name for name in {**recorded, **now} if name in recorded or name not in ADDED_FIELDS]
    if recorded and (other := [name for name in names if recorded.get(name) != now.get(name)]):
        told = "; ".join(f"{name} {_short(recorded.get(name))}, now {_short(now.get(name))}" for name in other)
        raise JournalError(
            f"edit {request.id!r} was made with other data ({told}): resume with the data the run was made with"
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
