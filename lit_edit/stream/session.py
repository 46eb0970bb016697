"""An editor at work on a ledger: one transaction after another, each of them whole, on record, and repeatable."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from lit_edit.data.request import EditRequest
from lit_edit.editors.base import Editor, Proposal
from lit_edit.ledger.edit_ledger import EditLedger, EditRefusedError, Origin, RecordedFacts
from lit_edit.ledger.journal import JournalError
from lit_edit.ledger.left_out import Why
from lit_edit.models.adapter import ModelAdapter
from lit_edit.solvers.functional import FactsError
from lit_edit.stream.conflicts import ConflictPolicy, find_conflicts, superseded
from lit_edit.stream.replay import Replay, check_request

log = logging.getLogger(__name__)

RefusalPolicy = Literal["stop", "skip"]

_HARMFUL = (FloatingPointError, EditRefusedError, FactsError)


class EditSession(Replay):
    """Makes edits, takes them out, and puts them back.

    Args:
        ledger: Writes the weights.
        editor: Works the updates out; prepared before :meth:`begin`.
        model_name: What the model is called, for the record.
        base_hash: Hash of its original weights.
        on_conflict: What to do about an edit of a fact that was edited before.
        on_refused: What to do about an edit that must not be written.
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
        super().__init__(ledger, editor, model_name, base_hash)
        self.on_conflict, self.on_refused = on_conflict, on_refused

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
            WeightsChangedError: If somebody else has written the model's weights: targets would be fitted on them.
        """
        self.ledger.verify()
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
            self.refuse([asked[name]], reason, "conflict")
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

    def refuse(self, requests: Sequence[EditRequest], reason: str, why: Why = "refused") -> None:
        """Put on record that edits are not made, and why."""
        ids, asked = [request.id for request in requests], [[r.text, r.target_new] for r in requests]
        places = [request.place for request in requests]
        where = f" ({', '.join(places)})" if all(places) else ""
        log.warning("not made: edit %s%s: %s", ", ".join(map(repr, ids)), where, reason)
        self.ledger.note(
            {"kind": "refused", "ids": ids, "asked": asked, "places": places, "why": why, "reason": reason}
        )

    def preview(self, proposal: Proposal) -> ModelAdapter:
        """Return a view of the model as a proposal would make it."""
        view, memory = self.ledger.preview(proposal.updates), self.editor.memory_after(proposal)
        return view if memory is None else view.with_memory(memory)

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
