"""How far into a stream a journal has come: one function for runs that go on, in whatever way."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_edit.data.request import EditRequest
from lit_edit.ledger.history import EditHistory
from lit_edit.stream.replay import check_request


def dealt_with(history: EditHistory, requests: Sequence[EditRequest], step: int = 1) -> int:
    """Return how many edits of a stream are on record, made or refused, and check that they are its first.

    Args:
        history: What is on record.
        requests: The stream.
        step: Edits that are made together.

    Raises:
        MisconfigurationException: If they are not; :class:`JournalError` if one says something else now.
    """
    handled, by_id = list(dict.fromkeys(history.handled)), {request.id: request for request in requests}
    for number, name in enumerate(handled):
        first = number - number % step  # of a step some may have been refused before others were made
        if name not in {request.id for request in requests[first : first + step]}:
            ahead = repr(requests[number].id) if number < len(requests) else "missing"
            raise MisconfigurationException(
                f"the checkpoint's edit {number + 1} is {name!r}, the stream's is {ahead}: resume with the data "
                "it was made with"
            )
    for entry in history.made[history.carried :]:
        check_request(by_id[entry.id], entry.request)
    return len(history.handled)
