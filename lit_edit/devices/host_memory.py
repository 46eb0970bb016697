"""Giving memory back to the system."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGEST = 1 << 25  # 32 MiB, the most that glibc takes as a threshold for mapping
LARGE = _LARGEST - 4096
"""Tensors of up to so many bytes are allocated quickly where memory is kept; larger ones come from the system."""


@cache
def _glibc(name: str) -> Any:
    """Return one of glibc's functions, or ``None`` where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed host memory for the next tensors, inside this context, and give it back at the end.

    By default glibc returns the end of its heap to the system as soon as some tens of megabytes are free, and fetches
    it again, page by page, for the next tensor: that takes longer than many an operation on it.
    """
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        if mallopt is not None:
            mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)  # where glibc's own rule ends up
        release_free_memory()


def release_free_memory() -> None:
    """Return freed host memory to the system.

    Fitting targets and measuring allocate large tensors of ever other sizes. glibc keeps what they leave, in pieces
    that the next ones do not fit into: without this a stream of a hundred edits holds a gigabyte of nothing.
    """
    if (trim := _glibc("malloc_trim")) is not None:
        trim(0)
