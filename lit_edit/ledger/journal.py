"""The journal: what was done to a model, one record after another, on disk before the model changes.

A file of framed records. Each frame is a mark, the length and the digest of its payload, and the payload: a
safetensors file in memory, whose metadata holds the record as JSON. Digests are chained, so a record vouches for all
before it. A process that dies while it appends leaves half a frame at the end, which the next one cuts off; nothing
before it is ever written again.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from lit_edit.errors import UserError
from lit_edit.files.paths import sync_folder

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

Record = dict[str, Any]
"""Primitives: text, numbers, lists and dictionaries of them."""

_MARK = b"\x89LEDIT\r\n"
_FRAME = struct.Struct("<8sQ16s")  # mark, length of the payload, digest
_START = b"\0" * 16  # the digest before the first record


class JournalError(UserError):
    """A journal that cannot be read or does not fit; the message says what to do."""


@dataclass(frozen=True)
class JournalPlace:
    """Where a record stands, and what it says apart from its tensors."""

    offset: int
    length: int
    digest: bytes
    record: Record


class Journal:
    """Append-only records with tensors.

    Args:
        path: The file, made when it is not there; ``None`` keeps the records in memory.
        repair: What to do about records that are damaged and followed by others: raise, or set everything from the
            first damaged one on aside (``<name>.damaged``) and go on without it. Half a record at the very end is what
            a crash leaves; it is cut off in any case.
        writable: With ``False`` the file is only looked at: another process may be writing it.

    Raises:
        JournalError: If the file cannot be read, or is damaged before its end and ``repair`` is not set.

    Example:
        >>> import torch
        >>> journal = Journal()
        >>> journal.append({"kind": "edit"}, {"keys.6": torch.ones(2, 1)})
        0
        >>> journal.records[0], journal.tensors(0)["keys.6"].shape
        ({'kind': 'edit'}, torch.Size([2, 1]))
    """

    def __init__(self, path: Path | None = None, repair: bool = False, writable: bool = True) -> None:
        self.path, self.writable = path, writable
        self._places: list[JournalPlace] = []
        self._memory = io.BytesIO()
        if path is not None and writable:
            _make(path)
        self._read(repair)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def records(self) -> list[Record]:
        """All records without their tensors, oldest first."""
        return [place.record for place in self._places]

    def record(self, index: int) -> Record:
        """Return one record without its tensors."""
        return self._places[index].record

    def digest(self, count: int | None = None) -> str:
        """Return what vouches for the first ``count`` records (by default all), as hexadecimal digits."""
        count = len(self) if count is None else count
        return (self._places[count - 1].digest if count else _START).hex()

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Return the tensors of a record, as they were."""
        from safetensors.torch import load  # torch takes seconds, and most who read a journal want its records alone

        place = self._places[index]
        with self._open() as file:
            file.seek(place.offset)
            payload = file.read(place.length)
        try:
            loaded = load(payload)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise JournalError(
                f"{self._name}: record {index + 1} holds no tensors that can be read ({error})"
            ) from error
        # Into memory of their own: products of unaligned matrices may round otherwise.
        return {name: value.clone() for name, value in loaded.items()}

    def append(self, record: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> int:
        """Add a record; when this returns it is on disk, and if it raises the file is as it was.

        Args:
            record: Primitives.
            tensors: On any device; they are copied.

        Returns:
            Its index.

        Raises:
            OSError: If the disk is full or gone.
        """
        from safetensors.torch import save

        text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
        ready = {name: value.detach().cpu().contiguous() for name, value in (tensors or {}).items()}
        payload = save(ready, metadata={"record": text})
        digest = _chain(self._places[-1].digest if self._places else _START, payload)
        end = self._end()
        try:
            with self._open(write=True) as file:
                file.seek(end)
                rest = memoryview(_FRAME.pack(_MARK, len(payload), digest) + payload)
                while rest:  # a disk that is getting full takes less than it is given
                    rest = rest[file.write(rest) :]
                self._sync(file)
        except BaseException:
            with suppress(OSError):  # what is left is half a record: the next process cuts it off
                self._cut(end)
            raise
        self._places.append(JournalPlace(end + _FRAME.size, len(payload), digest, json.loads(text)))
        return len(self) - 1

    def copy_to(self, other: Journal, count: int | None = None) -> None:
        """Append the first ``count`` records (by default all) to another journal."""
        for index in range(len(self) if count is None else count):
            other.append(self._places[index].record, self.tensors(index))

    def as_bytes(self) -> bytes:
        """Return all records as the bytes of a journal file."""
        with self._open() as file:
            file.seek(0)
            return bytes(file.read(self._end()))

    @classmethod
    def from_bytes(cls, data: bytes) -> Journal:
        """Return a journal in memory with the records of a file."""
        journal = cls()
        journal._memory = io.BytesIO(data)
        journal._read(repair=False)
        return journal

    # ---- the file -----------------------------------------------------------------------------------------------

    @contextmanager
    def _open(self, write: bool = False) -> Iterator[Any]:
        """Open the file, held open for a moment only; what is written goes through no buffer, which could fail late."""
        if self.path is None:
            yield self._memory
        elif write:
            with self.path.open("r+b", buffering=0) as file:
                yield file
        else:  # with a buffer: a bare file reads two gigabytes at most
            with self.path.open("rb") as file:
                yield file

    @property
    def _name(self) -> str:
        return "the journal in memory" if self.path is None else str(self.path)

    def _read(self, repair: bool) -> None:
        try:
            with self._open() as file:
                size = file.seek(0, os.SEEK_END)
                while (end := self._end()) < size:
                    place = self._read_frame(file, end, size)
                    if place is None:
                        break
                    self._places.append(place)
                file.seek(end)
                rest = file.read()
        except OSError as error:
            raise JournalError(f"the journal {self.path} cannot be read: {error.strerror or error}") from error
        if rest:
            self._give_up(end, rest, repair)

    def _read_frame(self, file: Any, offset: int, size: int) -> JournalPlace | None:
        file.seek(offset)
        head = file.read(_FRAME.size)
        if len(head) < _FRAME.size:
            return None
        mark, length, digest = _FRAME.unpack(head)
        if mark != _MARK or length > size - offset - _FRAME.size:  # no memory for what a damaged length promises
            return None
        payload = file.read(length)
        if len(payload) < length or _chain(self._places[-1].digest if self._places else _START, payload) != digest:
            return None
        try:
            return JournalPlace(offset + _FRAME.size, length, digest, _record_of(payload))
        except JournalError as error:
            raise JournalError(f"{self._name}: record {len(self) + 1} (at byte {offset}): {error}") from error

    def _give_up(self, end: int, rest: bytes, repair: bool) -> None:
        """Deal with what stands behind the last whole record."""
        number = len(self) + 1
        followed = _MARK in rest[1:]  # by more records: this is no crash in the middle of an append
        begun = rest.startswith(_MARK[: len(rest)]) or not rest.strip(b"\0")  # zeros: of a machine that went down
        if not (self._places or begun or followed):
            raise JournalError(f"{self._name} is not a journal of lit-edit")
        if not followed and not self.writable:
            return  # somebody is writing it just now, or was
        if followed:
            if not (repair and self.writable):
                raise JournalError(
                    f"{self._name}: record {number} (at byte {end}) is damaged and others follow it. Restore the file "
                    "from a copy, or run the stream again with --resume auto: it sets the damaged part aside and makes "
                    "those edits again"
                )
            if self.path is not None:
                aside = self._set_aside(rest)
                log.warning(
                    "%s: record %d is damaged; it and what follows is now in %s. Its edits will be made again%s",
                    self.path,
                    number,
                    aside,
                    "".join(f"; {change} will NOT: repeat it by hand" for change in _changes_in(rest)),
                )
        else:
            log.warning("%s: cut off half a record (%d bytes), as a crash leaves it", self._name, len(rest))
        self._cut(end)

    def _set_aside(self, rest: bytes) -> Path:
        """Keep what cannot be read on, beside the file, under a name that is free."""
        assert self.path is not None  # noqa: S101 - for the type checker
        aside, count = self.path.with_name(f"{self.path.name}.damaged"), 1
        while aside.exists():
            count += 1
            aside = self.path.with_name(f"{self.path.name}.damaged-{count}")
        with aside.open("xb") as file:
            file.write(rest)
            file.flush()
            os.fsync(file.fileno())
        return aside

    def _end(self) -> int:
        return self._places[-1].offset + self._places[-1].length if self._places else 0

    def _cut(self, end: int) -> None:
        with self._open(write=True) as file:
            file.truncate(end)
            self._sync(file)

    def _sync(self, file: Any) -> None:
        if self.path is not None:
            os.fsync(file.fileno())


def _make(path: Path) -> None:
    """Make sure that a file can be written; a new one is in its folder for good."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        path.open("ab").close()
        if new:
            sync_folder(path.parent)
    except OSError as error:
        raise JournalError(f"the journal {path} cannot be written: {error.strerror or error}") from error


def _chain(before: bytes, payload: bytes) -> bytes:
    return hashlib.blake2b(before + payload, digest_size=16).digest()


def _record_of(payload: bytes) -> Record:
    """Return the record that a payload carries; its digest is right, so it is as it was written."""
    try:
        (length,) = struct.unpack_from("<Q", payload)
        record = json.loads(json.loads(payload[8 : 8 + length])["__metadata__"]["record"])
    except (struct.error, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise JournalError(f"not a record of lit-edit ({error})") from error
    if not isinstance(record, dict):
        raise JournalError("not a record of lit-edit")
    return record


def _changes_in(rest: bytes) -> list[str]:
    """Return what was done by hand in the records that can still be read in a damaged part."""
    found, at = [], rest.find(_MARK)
    while at >= 0:
        with suppress(struct.error, JournalError):
            length = _FRAME.unpack_from(rest, at)[1]
            record = _record_of(rest[at + _FRAME.size : at + _FRAME.size + min(length, len(rest))])
            if record.get("origin") == "user":
                numbers = [*record.get("removed", ()), *record.get("restored", ())]
                found.append(f"{record.get('kind')} of edit {', '.join(map(str, numbers))}")
        at = rest.find(_MARK, at + 1)
    return found
