"""A journal that ranks keep together: one file, the same records and digests on all."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_edit.devices.ranks import Ranks
from lit_edit.ledger.journal import Journal
from lit_edit.ledger.shared_journal import SharedJournal
from tests.ledger.test_journal import RECORDS, flip, frames, same_tensors, tensors_of, with_room
from tests.ranks.together import Found, raised, together

SIZES = [2, 3]


def told_of(journal: Journal) -> Found:
    """All that a journal says of its records."""
    found = {"records": journal.records, "length": len(journal)}
    found["digests"] = [journal.digest(count) for count in range(len(journal) + 1)]
    found["last"] = [journal.digest(), journal.record(len(journal) - 1) if len(journal) else None]
    for index in range(len(journal)):
        found |= {f"{index} {name}": value for name, value in journal.tensors(index).items()}
    return found


def keep(ranks: Ranks, path: str) -> Found:
    journal = SharedJournal(ranks, Path(path))
    found: Found = {f"empty {name}": value for name, value in told_of(journal).items()}
    # What a rank alone would write is not asked for: the leader's records count.
    indices = [journal.append({**record, "rank": ranks.rank}, tensors_of(i)) for i, record in enumerate(RECORDS)]
    again = SharedJournal(ranks, Path(path))
    found |= {f"first {name}": value for name, value in told_of(journal).items()}
    found |= {f"again {name}": value for name, value in told_of(again).items()}
    indices.append(again.append({"kind": "redo"}))
    return found | {"indices": indices, "path": str(journal.path)} | told_of(again)


@pytest.mark.parametrize("size", SIZES)
def test_all_ranks_know_what_the_file_says(size: int, tmp_path: Path) -> None:
    path = tmp_path / "ledger" / "journal"
    everyone = together(size, keep, str(path))
    plain = Journal(path, writable=False)
    records = [{**record, "rank": 0} for record in RECORDS]
    assert plain.records == [*records, {"kind": "redo"}]
    expected = told_of(plain)
    for found in everyone:
        assert found["indices"] == [0, 1, 2, 3]
        assert found["path"] == str(path)
        assert (found["empty records"], found["empty length"], len(found["empty digests"])) == ([], 0, 1)
        for when in ("first", "again"):
            assert found[f"{when} records"] == records
            assert found[f"{when} digests"] == expected["digests"][:4]
        assert found["last"] == [plain.digest(), {"kind": "redo"}]
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert same_tensors({name: found[name]}, {name: value})
            else:
                assert found[name] == value, name
    for index in range(3):
        assert same_tensors(plain.tensors(index), tensors_of(index))


def move_in(ranks: Ranks, path: str) -> Found:
    """Records of memory go into the file, as when a stream takes a journal up; and one process goes on with it."""
    memory = Journal()
    for index, record in enumerate(RECORDS):
        memory.append(record, tensors_of(index))
    journal = SharedJournal(ranks, Path(path))
    memory.copy_to(journal)
    back = Journal()
    journal.copy_to(back, 2)
    return {"digests": [memory.digest(), journal.digest(), back.digest(), memory.digest(2)]}


@pytest.mark.parametrize("size", SIZES)
def test_records_move_between_journals(size: int, tmp_path: Path) -> None:
    for found in together(size, move_in, str(tmp_path / "journal")):
        memory, shared, back, first_two = found["digests"]
        assert memory == shared == Journal(tmp_path / "journal").digest()
        assert back == first_two != memory


# ---- files that cannot be read or written ----------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "journal"
    journal = Journal(path)
    for index, record in enumerate(RECORDS):
        journal.append(record, tensors_of(index))
    return path


def open_damaged(ranks: Ranks, path: str, repair: bool) -> Found:
    try:
        return {"records": SharedJournal(ranks, Path(path), repair).records, "after": ranks.gather(ranks.rank)}
    except Exception as error:
        return {"error": [type(error).__name__, str(error)], "after": ranks.gather(ranks.rank)}


@pytest.mark.parametrize("size", SIZES)
def test_a_damaged_file_is_an_error_on_all_ranks_or_repaired_once(size: int, written: Path) -> None:
    data = written.read_bytes()
    first = len(frames(data)[0])
    damaged = flip(data, 8 * (first + 50))
    written.write_bytes(damaged)
    for found in together(size, open_damaged, str(written), False):
        assert found["error"][0] == "JournalError"
        assert f"record 2 (at byte {first}) is damaged" in found["error"][1]
        assert found["after"] == list(range(size))
    assert written.read_bytes() == damaged
    for found in together(size, open_damaged, str(written), True):
        assert found["records"] == RECORDS[:1]
    assert written.read_bytes() == data[:first]
    assert [path.name for path in sorted(written.parent.iterdir())] == ["journal", "journal.damaged"]
    assert written.with_name("journal.damaged").read_bytes() == damaged[first:]


def fill_up(ranks: Ranks, path: str) -> Found:
    journal = SharedJournal(ranks, Path(path))
    with pytest.MonkeyPatch.context() as patch:
        if ranks.leads:
            with_room(patch, 40)
        found: Found = {"full": raised(lambda: journal.append({"kind": "undo"}, tensors_of(1)))}
    found |= {"length": len(journal), "digest": journal.digest(), "bytes": Path(path).stat().st_size}
    found["unwritable"] = raised(lambda: journal.append({"kind": {1, 2}}))
    found["index"] = journal.append({"kind": "redo"})
    Path(path).write_bytes(b"") if ranks.leads else None
    ranks.gather(None)
    return found | {"gone": raised(lambda: journal.tensors(0)), "after": ranks.gather(ranks.rank)}


@pytest.mark.parametrize("size", SIZES)
def test_an_append_that_fails_fails_on_all_ranks_and_leaves_the_file(size: int, written: Path) -> None:
    plain, length = Journal(written), written.stat().st_size
    for rank, found in enumerate(together(size, fill_up, str(written))):
        message = f"[Errno {errno.ENOSPC}] No space left on device"
        full = ["OSError", message] if rank == 0 else ["RankError", f"rank {rank} stops, for rank 0 has: {message}"]
        assert found["full"] == full
        assert (found["length"], found["digest"], found["bytes"]) == (3, plain.digest(), length)
        assert found["unwritable"][0] == ("TypeError" if rank == 0 else "RankError")
        assert found["index"] == 3
        assert found["gone"][0] == "JournalError"
        assert found["after"] == list(range(size))


def look(ranks: Ranks, path: str) -> dict[str, Any]:
    """Only the leader opens the file: the others may be on machines that do not see it."""
    journal = SharedJournal(ranks, Path(path) if ranks.leads else Path("/nowhere/at/all"))
    journal.append({"kind": "redo"})
    return told_of(journal)


@pytest.mark.parametrize("size", SIZES)
def test_only_the_leader_opens_the_file(size: int, written: Path) -> None:
    everyone = together(size, look, str(written))
    for found in everyone:
        assert found["records"] == [*RECORDS, {"kind": "redo"}] == Journal(written).records
        assert same_tensors({"keys.6": found["1 keys.6"]}, {"keys.6": tensors_of(1)["keys.6"]})
