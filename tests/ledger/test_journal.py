"""The journal: what was appended comes back, what a crash or a disk has damaged is found, all else stays."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from lit_edit.ledger.journal import Journal, JournalError

MARK = b"\x89LEDIT\r\n"
HEAD = 32  # bytes before a payload

RECORDS: list[dict[str, Any]] = [
    {"kind": "begin", "text": "Zürich \u2028 \U0001f600 \x00", "number": 0.1 + 0.2, "big": 2**70, "none": None},
    {"kind": "edit", "entries": [{"id": "../../x", "facts": {"loss": 1e-300}}], "removed": [], "facts": True},
    {"kind": "undo", "removed": [1, 2], "nested": {"a": [[], {}]}},
]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tensors_of(index: int) -> dict[str, Tensor]:
    """Tensors as they come: transposed, of no columns, on a type of two bytes, with special values."""
    if index == 0:
        return {}
    odd = torch.tensor([float("nan"), float("inf"), -0.0], dtype=torch.float64)
    return {
        "keys.6": draw(3, 4, seed=index).T,
        "empty": torch.empty(5, 0),
        "half": draw(2, 2, seed=index, dtype=torch.bfloat16),
        "odd": odd,
        "blocks": torch.tensor([1, 3]),
    }


def bits(value: Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        value.dtype == expected[name].dtype
        and value.shape == expected[name].shape
        and bits(value) == bits(expected[name])
        for name, value in found.items()
    )


def fill(journal: Journal) -> Journal:
    for index, record in enumerate(RECORDS):
        assert journal.append(record, tensors_of(index)) == index
    return journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger" / "journal"


@pytest.fixture
def written(path: Path) -> Path:
    """A journal of three records."""
    fill(Journal(path))
    return path


def frames(data: bytes) -> list[bytes]:
    """The frames of a journal, read as its format says."""
    found, at = [], 0
    while at < len(data):
        mark, length = struct.unpack_from("<8sQ", data, at)
        assert mark == MARK
        found.append(data[at : at + HEAD + length])
        at += HEAD + length
    return found


def frame(payload: bytes, before: bytes = b"\0" * 16, length: int | None = None) -> bytes:
    """A frame whose digest is right."""
    digest = hashlib.blake2b(before + payload, digest_size=16).digest()
    return struct.pack("<8sQ16s", MARK, len(payload) if length is None else length, digest) + payload


# ---- round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_disk", [True, False], ids=["on disk", "in memory"])
def test_what_was_appended_comes_back(path: Path, on_disk: bool) -> None:
    journal = fill(Journal(path if on_disk else None))
    opened = Journal(path) if on_disk else Journal.from_bytes(journal.as_bytes())
    for one in (journal, opened):
        assert one.records == RECORDS
        assert len(one) == 3
        for index in range(3):
            assert same_tensors(one.tensors(index), tensors_of(index))
    assert opened.digest() == journal.digest() == opened.digest(3)
    assert len({journal.digest(count) for count in range(4)}) == 4


def test_tensors_are_independent_of_what_was_given_and_of_each_other(path: Path) -> None:
    journal, given = Journal(path), draw(2, 3)
    journal.append({"kind": "edit"}, {"keys": given})
    given.zero_()
    first = journal.tensors(0)["keys"]
    first.zero_()
    second = journal.tensors(0)["keys"]
    assert torch.equal(second, draw(2, 3))
    assert second.data_ptr() % 16 == 0  # aligned as a tensor of its own: products round the same
    record = journal.records[0]
    assert record == {"kind": "edit"}


def test_a_record_is_on_disk_when_append_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_size), fsync(handle))[1])
    journal = Journal(path)
    assert len(synced) == 1  # the folder: a new file is in it for good
    for index, record in enumerate(RECORDS):
        synced.clear()
        journal.append(record, tensors_of(index))
        assert synced == [path.stat().st_size]
        assert Journal(path, writable=False).records == RECORDS[: index + 1]


def test_appending_goes_on_in_a_file_of_an_earlier_process(written: Path) -> None:
    before = written.read_bytes()
    journal = Journal(written)
    journal.append({"kind": "redo"}, {"keys": torch.ones(2)})
    assert written.read_bytes().startswith(before)
    assert Journal(written).records == [*RECORDS, {"kind": "redo"}]


def test_as_bytes_is_the_file(written: Path) -> None:
    data = Journal(written).as_bytes()
    assert data == written.read_bytes()
    again = Journal.from_bytes(data)
    again.append({"kind": "end"})
    assert len(again) == 4
    assert written.read_bytes() == data


@pytest.mark.parametrize("count", [None, 2, 0])
def test_copies_have_the_same_digests(written: Path, tmp_path: Path, count: int | None) -> None:
    source, target = Journal(written), Journal(tmp_path / "copy")
    source.copy_to(target, count)
    length = 3 if count is None else count
    assert target.records == RECORDS[:length]
    assert target.digest() == source.digest(length)
    assert target.as_bytes() == b"".join(frames(written.read_bytes())[:length])


# ---- half a record at the end ----------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of journals need not reach the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.mark.usefixtures("quick")
def test_a_file_cut_at_any_byte_of_its_last_record_keeps_the_records_before(written: Path) -> None:
    data = written.read_bytes()
    kept = b"".join(frames(data)[:2])
    cuts = range(len(kept), len(data))
    for cut in cuts:
        written.write_bytes(data[:cut])
        assert Journal(written, writable=False).records == RECORDS[:2], cut
        assert written.stat().st_size == cut
        journal = Journal(written)
        assert journal.records == RECORDS[:2], cut
        assert written.read_bytes() == kept, cut
    journal.append(RECORDS[2], tensors_of(2))
    assert written.read_bytes() == data


def test_a_first_record_that_is_cut_leaves_an_empty_journal(path: Path) -> None:
    Journal(path).append(RECORDS[0])
    data = path.read_bytes()
    for cut in (0, 1, 7, 8, 20, HEAD, len(data) - 1):
        path.write_bytes(data[:cut])
        assert len(Journal(path)) == 0
        assert path.read_bytes() == b""


@pytest.mark.parametrize("kept", [0, 2], ids=["instead of the first record", "behind others"])
def test_zeros_are_what_a_machine_that_went_down_left(written: Path, kept: int) -> None:
    before = b"".join(frames(written.read_bytes())[:kept])
    written.write_bytes(before + b"\0" * 5000)
    assert Journal(written).records == RECORDS[:kept]
    assert written.read_bytes() == before


def test_a_cut_is_told(written: Path, caplog: pytest.LogCaptureFixture) -> None:
    with written.open("r+b") as file:
        file.truncate(written.stat().st_size - 1)
    with caplog.at_level(logging.WARNING):
        Journal(written)
    assert f"{written}: cut off half a record" in caplog.text
    caplog.clear()
    Journal(written)
    assert caplog.text == ""


# ---- damage ----------------------------------------------------------------------------------------------------------


def flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.usefixtures("quick")
def test_a_bit_flipped_anywhere_in_the_last_record_is_found(written: Path) -> None:
    data = written.read_bytes()
    kept = b"".join(frames(data)[:2])
    rng = random.Random(0)
    header = range(8 * len(kept), 8 * (len(kept) + HEAD))
    places = [*header, *rng.sample(range(header.stop, 8 * len(data)), 200)]
    for bit in places:
        written.write_bytes(flip(data, bit))
        assert Journal(written).records == RECORDS[:2], bit
        assert written.read_bytes() == kept, bit


def test_a_bit_flipped_before_other_records_is_an_error_that_names_the_place(written: Path) -> None:
    data = written.read_bytes()
    parts = frames(data)
    rng = random.Random(1)
    first = 8 * len(parts[0])
    header = range(first, first + 8 * HEAD)
    places = [*header, *rng.sample(range(header.stop, first + 8 * len(parts[1])), 100)]
    for bit in places:
        damaged = flip(data, bit)
        written.write_bytes(damaged)
        for writable in (True, False):
            with pytest.raises(JournalError, match=rf"record 2 \(at byte {len(parts[0])}\) is damaged") as error:
                Journal(written, writable=writable)
            assert str(written) in str(error.value)
        assert written.read_bytes() == damaged, bit


@pytest.mark.parametrize("number", [0, 1])
def test_repair_sets_the_damaged_part_aside(written: Path, number: int, caplog: pytest.LogCaptureFixture) -> None:
    data = written.read_bytes()
    parts = frames(data)
    at = sum(map(len, parts[:number]))
    damaged = flip(data, 8 * (at + 3) if number == 0 else 8 * (at + HEAD + 40))  # 0: the very mark of the file
    written.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        journal = Journal(written, repair=True)
    assert journal.records == RECORDS[:number]
    assert written.read_bytes() == data[:at]
    assert written.with_name("journal.damaged").read_bytes() == damaged[at:]
    assert f"record {number + 1} is damaged" in caplog.text
    journal.append(RECORDS[number], tensors_of(number))
    assert Journal(written).records == RECORDS[: number + 1]


def test_repair_of_a_whole_journal_does_nothing(written: Path) -> None:
    data = written.read_bytes()
    assert Journal(written, repair=True).records == RECORDS
    assert written.read_bytes() == data
    assert [file.name for file in written.parent.iterdir()] == ["journal"]


@pytest.mark.parametrize(
    ("order", "number"),
    [((1, 0, 2), 1), ((0, 2, 1), 2), ((0, 2), None), ((1, 2), 1), ((0, 0, 1, 2), 2)],
    ids=["first two swapped", "last two swapped", "second removed", "first removed", "first twice"],
)
def test_the_chain_of_digests_finds_records_out_of_place(
    written: Path, order: tuple[int, ...], number: int | None
) -> None:
    parts = frames(written.read_bytes())
    written.write_bytes(b"".join(parts[index] for index in order))
    if number is None:  # the one left behind the gap is the last: it cannot be told from a damaged tail
        assert Journal(written).records == RECORDS[:1]
        return
    with pytest.raises(JournalError, match=f"record {number} "):
        Journal(written)


# ---- files that are none, and files that must stay as they are -------------------------------------------------------


@pytest.mark.parametrize("content", [b"x", b"a model of mine\n" * 100, MARK[1:] + b"rest", b"\x89PNG\r\n\x1a\n rest"])
def test_another_file_is_refused_and_left_alone(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    for options in ({}, {"repair": True}, {"writable": False}):
        with pytest.raises(JournalError, match="is not a journal of lit-edit"):
            Journal(path, **options)
    assert path.read_bytes() == content


@pytest.mark.usefixtures("quick")
def test_looking_never_changes_a_file(written: Path) -> None:
    data = written.read_bytes()
    parts = frames(data)
    tails = [b"", b"\x89LED", MARK, parts[2][:-1], flip(parts[2], 70), b"\0" * 100, b"\0", b"other", parts[0]]
    for tail in tails:
        for repair in (False, True):
            content = parts[0] + parts[1] + tail
            written.write_bytes(content)
            stamp = written.stat().st_mtime_ns
            assert Journal(written, repair=repair, writable=False).records == RECORDS[:2], tail
            assert written.read_bytes() == content
            assert written.stat().st_mtime_ns == stamp
    damaged = flip(data, 8 * (len(parts[0]) + HEAD + 9))
    written.write_bytes(damaged)
    with pytest.raises(JournalError, match="record 2 "):
        Journal(written, repair=True, writable=False)
    assert written.read_bytes() == damaged
    assert [file.name for file in written.parent.iterdir()] == ["journal"]


def test_looking_at_what_is_not_there_makes_nothing(path: Path) -> None:
    with pytest.raises(JournalError, match="cannot be read: No such file"):
        Journal(path, writable=False)
    assert not path.parent.exists()


def test_a_place_where_no_file_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "ledger").write_text("a file in place of the folder")
    with pytest.raises(JournalError, match=r"journal .*ledger/journal cannot be written: "):
        Journal(tmp_path / "ledger" / "journal")


# ---- appends that fail -----------------------------------------------------------------------------------------------


class Full:
    """A file that takes so many bytes and then no more."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self._room = file, room

    def write(self, data: Any) -> int:
        if not self._room:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = min(self._room, len(data))
        self._room -= count
        return int(self._file.write(data[:count]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *args: object) -> None:
        self._file.close()


def with_room(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Let files that are opened to be written take so many bytes."""
    real = Path.open

    def open_full(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        file = real(path, mode, *args, **options)
        return Full(file, room) if "+" in mode else file

    monkeypatch.setattr(Path, "open", open_full)


@pytest.mark.parametrize("room", [0, 1, HEAD, HEAD + 100])
def test_a_disk_that_fills_up_leaves_the_file_as_it_was(
    written: Path, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, journal = written.read_bytes(), Journal(written)
    with monkeypatch.context() as patch:
        with_room(patch, room)
        with pytest.raises(OSError, match="No space left") as error:
            journal.append({"kind": "undo"}, {"keys": draw(20, 20)})
    assert error.value.errno == errno.ENOSPC
    assert written.read_bytes() == data
    assert journal.records == RECORDS
    assert journal.append({"kind": "redo"}) == 3
    assert Journal(written).records == [*RECORDS, {"kind": "redo"}]


def test_a_disk_that_takes_a_little_at_a_time_gets_it_all(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Full):
        def write(self, data: Any) -> int:
            return int(self._file.write(data[:7]))

    real = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode="r", **options: Slow(real(path, mode, **options), 0))
        Journal(written).append({"kind": "redo"}, tensors_of(1))
    assert Journal(written).records == [*RECORDS, {"kind": "redo"}]
    assert same_tensors(Journal(written).tensors(3), tensors_of(1))


@pytest.mark.parametrize("failure", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_record_that_did_not_reach_the_disk_does_not_count(
    written: Path, failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, journal = written.read_bytes(), Journal(written)
    calls: list[int] = []

    def fail_once(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 1:
            raise failure

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_once)
        with pytest.raises(type(failure)):
            journal.append({"kind": "undo"})
    assert written.read_bytes() == data
    assert len(journal) == 3
    assert len(calls) == 2  # what was cut off is cut off for good


def test_a_file_that_can_be_neither_written_nor_cut_recovers_later(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, journal = written.read_bytes(), Journal(written)

    def dead(*args: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", dead)
        patch.setattr(Journal, "_cut", dead)
        with pytest.raises(OSError, match="Input/output"):
            journal.append({"kind": "undo", "long": "x" * 5000}, tensors_of(1))
    assert written.stat().st_size > len(data)
    journal.append({"kind": "redo"})  # shorter than what is left of the other
    assert Journal(written).records == [*RECORDS, {"kind": "redo"}]
    assert frames(written.read_bytes())[:3] == frames(data)


@pytest.mark.parametrize("record", [{"kind": {1, 2}}, {"kind": torch.ones(2)}, {"kind": "half \ud800"}])
def test_what_no_record_can_hold_is_refused(written: Path, record: dict[str, Any]) -> None:
    data, journal = written.read_bytes(), Journal(written)
    with pytest.raises((TypeError, ValueError)):
        journal.append(record)
    assert written.read_bytes() == data
    assert journal.records == RECORDS


# ---- hostile files ---------------------------------------------------------------------------------------------------


def payload_of(text: str, header: Callable[[dict[str, Any]], Any] = lambda header: header) -> bytes:
    """A payload whose header was worked on."""
    payload = safetensors.torch.save({"keys": torch.ones(4)}, metadata={"record": text})
    (length,) = struct.unpack_from("<Q", payload)
    changed = json.dumps(header(json.loads(payload[8 : 8 + length]))).encode()
    return struct.pack("<Q", len(changed)) + changed + payload[8 + length :]


@pytest.mark.parametrize("length", [1 << 30, 1 << 39, (1 << 40) + 1, (1 << 64) - 1])
def test_a_length_beyond_the_file_is_not_believed(written: Path, length: int) -> None:
    """It would be asked for as memory."""
    kept = b"".join(frames(written.read_bytes())[:2])
    written.write_bytes(kept + frame(b"payload", length=length))
    assert Journal(written).records == RECORDS[:2]
    assert written.read_bytes() == kept


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"short",
        b"\xff" * 40,
        payload_of("not JSON"),
        payload_of("[1, 2]"),
        payload_of("[" * 100_000),
        payload_of("{}", lambda header: {**header, "__metadata__": None}),
        payload_of("{}", lambda header: [header]),
        payload_of("{}", lambda header: {"keys": header["keys"]}),
    ],
    ids=["empty", "short", "ones", "no JSON", "a list", "deep", "no metadata", "header a list", "no record"],
)
def test_hostile_payloads_with_a_right_digest_are_refused(path: Path, payload: bytes) -> None:
    Journal(path).append(RECORDS[0])
    (first,) = frames(path.read_bytes())
    written = first + frame(payload, bytes.fromhex(Journal(path).digest()))
    path.write_bytes(written)
    for options in ({}, {"writable": False}, {"repair": True}):
        with pytest.raises(
            JournalError, match=rf"journal: record 2 \(at byte {len(first)}\): not a record of lit-edit"
        ):
            Journal(path, **options)
    assert path.read_bytes() == written


def offsets(start: int, end: int) -> Callable[[dict[str, Any]], Any]:
    return lambda header: {**header, "keys": {**header["keys"], "data_offsets": [start, end]}}


@pytest.mark.parametrize(
    "header",
    [
        offsets(0, 1 << 50),
        offsets(8, 4),
        lambda header: {**header, "keys": {**header["keys"], "dtype": "PICKLE"}},
        lambda header: {**header, "keys": {**header["keys"], "shape": [1 << 40, 1 << 40]}},
        lambda header: {**header, "keys": None},
    ],
    ids=["beyond", "backward", "unknown type", "shape", "nothing"],
)
def test_hostile_tensors_with_a_right_digest_are_refused(path: Path, header: Callable[..., Any]) -> None:
    path.parent.mkdir()
    path.write_bytes(frame(payload_of('{"kind": "edit"}', header)))
    journal = Journal(path)
    assert journal.records == [{"kind": "edit"}]
    with pytest.raises(JournalError, match="journal: record 1 holds no tensors that can be read"):
        journal.tensors(0)
