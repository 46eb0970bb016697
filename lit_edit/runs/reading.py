"""What the folder of a run says without opening its model."""

from __future__ import annotations

from pathlib import Path

from lit_edit.errors import UserError
from lit_edit.ledger.history import EditHistory
from lit_edit.ledger.journal import Journal
from lit_edit.runs.files import journal_path


class RunError(UserError):
    """A run folder that cannot be opened; the message says why."""


def has_ended(folder: Path) -> bool:
    """Tell whether a run has come to its end and everything it leaves behind is written."""
    path = journal_path(folder)
    return path.is_file() and any(record["kind"] == "end" for record in Journal(path, writable=False).records)


def check_folder(folder: Path) -> Path:
    """Return the folder of a run, with ``~`` put in full.

    Raises:
        RunError: If there is none, or it is no run's.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise RunError(f"there is no run folder {folder}")
    if not (folder / "config.yaml").is_file():
        raise RunError(f"{folder} is no finished run (no config.yaml)")
    return folder


def read_history(folder: Path) -> EditHistory:
    """Return what the journal of a run says, without opening a model or changing a file.

    Raises:
        RunError: If there is no such run or it has no journal.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise RunError(f"there is no run folder {folder}")
    if not journal_path(folder).is_file():
        raise RunError(f"{folder} has no journal ({journal_path(folder)}): it is no run of this version of lit-edit")
    return EditHistory.of(Journal(journal_path(folder), writable=False).records)
