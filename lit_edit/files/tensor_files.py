"""Writing safetensors files so that a full or failing disk says so as Python does, by an :class:`OSError`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import strerror
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lit_edit.files.checksum import digest_of

_DIGEST = "digest of "


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write contiguous tensors that share no memory into one file; what the disk refuses is an :class:`OSError`."""
    with system_errors(path):
        save_file(dict(tensors), path, None if metadata is None else dict(metadata))


def with_digests(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return metadata that say what the bits of tensors are, for :func:`check_digests`."""
    return {**metadata, **{_DIGEST + name: digest_of(value) for name, value in tensors.items()}}


def check_digests(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Raise :class:`ValueError` for a tensor that is not what was written; files of earlier versions do not say."""
    for name, value in tensors.items():
        if metadata.get(_DIGEST + name) not in (None, digest_of(value)):
            raise ValueError(f"{name} is not what was written: bits have changed")


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Raise what the system refused while safetensors was writing to ``path`` as the :class:`OSError` that it is.

    Example:
        >>> with system_errors(Path("x")):
        ...     raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        Traceback (most recent call last):
        OSError: [Errno 28] No space left on device: 'x'
    """
    try:
        yield
    except SafetensorError as error:
        if found := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(found[1]), strerror(int(found[1])), str(path)) from error
        raise
