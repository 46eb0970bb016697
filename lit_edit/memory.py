"""Giving memory back to the system."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any


@cache
def _malloc_trim() -> Any:
    """Return glibc's ``malloc_trim``, or ``None`` where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def release_free_memory() -> None:
    """Return freed host memory to the system.

    Fitting targets and measuring allocate large tensors of ever other sizes. glibc keeps what they leave, in pieces
    that the next ones do not fit into: without this a stream of a hundred edits holds a gigabyte of nothing.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)
