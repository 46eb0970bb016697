"""A journal that several ranks keep together: the file is the leader's, the others know what it says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_edit.devices.ranks import Payload, Ranks
from lit_edit.ledger.journal import Journal, JournalError, JournalPlace, Record


class SharedJournal(Journal):
    """What :class:`Journal` is to one process, for many; every rank must do the same with it.

    Args:
        ranks: Who keeps it.
        path: The file; only the leader opens it.
        repair: As in :class:`Journal`.

    Raises:
        JournalError: On all ranks, if the leader cannot read the file.
    """

    def __init__(self, ranks: Ranks, path: Path, repair: bool = False) -> None:
        super().__init__()
        self.ranks, self.path = ranks, path
        self._file: Journal | None = None

        def work() -> Payload:
            self._file = Journal(path, repair=repair)
            return [[place.record, place.digest.hex()] for place in self._file._places], {}

        for record, digest in ranks.lead(work, (JournalError,))[0]:
            self._note(record, digest)

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Return the tensors of a record, as they were."""

        def work() -> Payload:
            assert self._file is not None  # noqa: S101 - run by the leader
            return None, self._file.tensors(index)

        return dict(self.ranks.lead(work, (JournalError,))[1])

    def append(self, record: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> int:
        """Add a record; when this returns it is on the leader's disk. See :meth:`Journal.append`."""

        def work() -> Payload:
            assert self._file is not None  # noqa: S101 - run by the leader
            index = self._file.append(record, tensors)
            return [self._file.record(index), self._file.digest()], {}

        written, digest = self.ranks.lead(work)[0]
        self._note(written, digest)
        return len(self) - 1

    def _note(self, record: Record, digest: str) -> None:
        self._places.append(JournalPlace(0, 0, bytes.fromhex(digest), record))
