"""Edits that are made one at a time, each on the unedited model, and taken back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING

from lit_edit.data.request import EditRequest
from lit_edit.editors.base import Editor, commit_proposal
from lit_edit.editors.closed_form.located import LocatedEditor
from lit_edit.ledger.edit_ledger import EditLedger, EditRefusedError
from lit_edit.models.adapter import ModelAdapter
from lit_edit.solvers.functional import FactsError
from lit_edit.stats.second_moment import KeyStatistics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HARMFUL = (FloatingPointError, EditRefusedError, FactsError)
"""Of edits that must not be written."""


class SingleEdits:
    """Makes one edit at a time with an editor that has made none; its layers are those to edit."""

    def __init__(
        self, editor: Editor, adapter: ModelAdapter, tokenizer: PreTrainedTokenizerBase, statistics: KeyStatistics
    ) -> None:
        self.editor, self.adapter, self.tokenizer = editor, adapter, tokenizer
        self.ledger = EditLedger(adapter, editor.resolve_layers(adapter))
        editor.prepare(self.ledger, tokenizer, statistics)
        # Preparing anew for each edit would take longer than the edit.
        self._fresh = self._prepared = deepcopy(editor.state_dict())

    def fit_ahead(self, requests: Sequence[EditRequest]) -> None:
        """Fit the targets of the next edits together, where the editor can."""
        self.editor.load_state_dict(deepcopy(self._fresh))
        if isinstance(self.editor, LocatedEditor):
            self.editor.fit_ahead(requests)
        self._prepared = deepcopy(self.editor.state_dict())

    @contextmanager
    def made(self, request: EditRequest) -> Iterator[str]:
        """Make an edit inside this context, and yield why it was refused, if it was."""
        refused = ""
        try:
            try:
                commit_proposal(self.ledger, self.editor, self.editor.propose([request], [request]))
            except HARMFUL as error:
                refused = str(error) or type(error).__name__
            yield refused
        finally:
            self.ledger.restore_base()
            self.editor.load_state_dict(deepcopy(self._prepared))
