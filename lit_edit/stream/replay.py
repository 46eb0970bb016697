"""Taking a journal up: what an earlier process has recorded is done again, bit for bit and without fitting anything.

So a run that died goes on as if it had not.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from lit_edit.data.request import ADDED_FIELDS, EditRequest
from lit_edit.editors.base import Editor, Proposal, Status, commit_proposal, silent
from lit_edit.errors import ArgumentError
from lit_edit.files.changes import refuse_changes, tell_changes
from lit_edit.ledger.edit_ledger import Change, EditLedger, LedgerEntry
from lit_edit.ledger.journal import JournalError, Record
from lit_edit.ledger.ownership import other_base

log = logging.getLogger(__name__)

_FORMAT = 1  # of the journal


class Replay:
    """Begins a journal, or does what is on record and not done yet.

    Args:
        ledger: Writes the weights.
        editor: Works the updates out; prepared before :meth:`begin`.
        model_name: What the model is called, for the record.
        base_hash: Hash of its original weights.

    Attributes:
        status: Receives a line about what is going on.
    """

    def __init__(self, ledger: EditLedger, editor: Editor, model_name: str, base_hash: str) -> None:
        self.ledger, self.editor = ledger, editor
        self.model_name, self.base_hash = model_name, base_hash
        self.status: Status = silent

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

    def begin(self, left_out: Sequence[tuple[str, str]] = ()) -> None:
        """Put the beginning of a stream on record; or check it, and do at once what came before this stream.

        ``left_out`` are the places of records that could not be read, and what is wrong with them.

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
                    **({} if self.ledger.adapter.sharded else {"parameters": self.ledger.prints}),
                    "settings": self.editor.settings(),
                    "opening": self.editor.opening(),
                    "kernels": self.ledger.adapter.kernels(),
                    **({"left_out": [list(left) for left in left_out]} if left_out else {}),
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
            hashes = begun["base_hash"], self.base_hash
            raise other_base(self.model_name, begun.get("parameters"), self.ledger.prints, hashes)
        cure = "use the config that they were made with, or start a run of another name"
        refuse_changes("the edits were made", begun["settings"], self.editor.settings(), cure)

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

    def repeat_between_steps(self) -> None:
        """Do again what was done between two steps, by hand or by a guard, and pass over the end of an earlier run."""
        while (record := self.ledger.next_record()) is not None:
            if record["kind"] != "end" and record.get("origin") not in ("user", "guard"):
                return
            self.repeat()

    def apply(self, proposal: Proposal) -> tuple[LedgerEntry, ...]:
        """Commit a proposal and take it into the editor's state; see :func:`commit_proposal`."""
        return commit_proposal(self.ledger, self.editor, proposal)


def check_request(request: EditRequest, recorded: Mapping[str, Any]) -> None:
    """Raise :class:`JournalError` if an edit of the data is not the one that was made under its id."""
    told = tell_changes(recorded, request.as_dict(), lambda name: name in recorded or name not in ADDED_FIELDS)
    if recorded and told:
        raise JournalError(
            f"edit {request.id!r} was made with other data ({told}): resume with the data the run was made with"
        )
