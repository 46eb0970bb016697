"""Going on with a session, or a run, from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lit_edit.errors import ArgumentError
from lit_edit.ledger.journal import Journal
from lit_edit.runs.files import journal_path, run_lock
from lit_edit.runs.folder import precision_of, stream_of
from lit_edit.runs.reading import RunError, check_folder
from lit_edit.session.session import Session
from lit_edit.stream.precision import cast_as

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def resume(
    folder: str | Path,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    progress: bool = True,
) -> Session:
    """Go on in the folder of a saved session, or of a run of the command line.

    Its edits are written into the base model as they are on record; nothing is fitted. What comes after goes on record
    there as well, before it is written.

    Args:
        folder: The folder.
        model: The base model, unedited; by default it is loaded as the folder says.
        tokenizer: Its tokenizer.
        progress: Show bars.

    Raises:
        RunError: If the folder cannot be opened.
        RunLockedError: If another process works in it.
        ArgumentError: If the base model is another one.
        WeightsChangedError: If the model that was given is edited already.
    """
    folder = check_folder(Path(folder)).resolve()
    if not journal_path(folder).is_file():
        raise RunError(f"{folder} has no journal ({journal_path(folder)}): there is nothing to go on with")
    if (model is None) != (tokenizer is None):
        raise ArgumentError("model and tokenizer belong together: give both or neither")
    stream = stream_of(folder)
    if model is None or tokenizer is None:
        model, tokenizer = stream.language_model.load()
        cast_as(model, precision_of(folder))
    session = Session(
        model,
        tokenizer,
        stream.editor,
        stream.statistics,
        stream.language_model,
        stream.on_conflict,
        stream.on_refused,
        progress,
    )
    session.held.enter_context(run_lock(folder, "folder"))
    session.ledger.take_up(Journal(journal_path(folder), repair=True))
    session.folder = folder
    try:
        session.base_hash  # does what is on record  # noqa: B018
    except BaseException:
        session.held.close()
        raise
    return session
