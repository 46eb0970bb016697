"""The Hugging Face hub where it cannot be reached: asked once, where its client would try again for half a minute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

SECONDS = 4.0
"""How long the hub may take to answer at all."""
_ABSENT = {"LocalEntryNotFoundError", "OfflineModeIsEnabled"}


def can_reach_hub() -> bool:
    """Tell whether the hub answers, whatever it says; not if ``HF_HUB_OFFLINE`` is set."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and _answers(constants.ENDPOINT)


@cache
def _answers(endpoint: str) -> bool:
    """Tell whether anybody answers at an address; asked once per process."""
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=SECONDS)
    except Exception:  # of the client's own kinds, which change with its version
        return False
    return True


@contextmanager
def reaching_hub() -> Iterator[None]:
    """Let the hub's client, and what uses it, look in its cache alone where the hub does not answer."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = not can_reach_hub()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def hub_fault(error: BaseException) -> str:
    """Return what an error of the hub's client comes to: in a sentence where something is neither kept nor in reach.

    Example:
        >>> hub_fault(ValueError("no such split"))
        'no such split'
    """
    cause: BaseException | None = error
    while cause is not None:
        if any(name in f"{type(cause).__name__} {cause}" for name in _ABSENT):
            return "it is not in the hub's cache, and the hub cannot be reached"
        cause = cause.__cause__ or cause.__context__
    return str(error)
