"""metrics.csv of a run folder: one row per number of edits, complete after every crash."""

from __future__ import annotations

import csv
import errno
import math
import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from lit_edit.loggers.run_csv import RunCSVLogger, read_rows

pytestmark = pytest.mark.filterwarnings("ignore:Experiment logs directory:UserWarning")
Rows = list[dict[str, str]]
Calls = Sequence[tuple[int, dict[str, float]]]

# What a stream logs: several things per edit, some of them not after each, and so columns that appear on the way.
CALLS: Calls = (
    (0, {"base/a": 0.1}),
    (0, {"norm": 1 / 3}),
    (1, {"edit/p": 0.2, "time/edit": 1.5}),
    (1, {"norm": 2 / 3}),
    (2, {"edit/p": 1e-300, "time/edit": 2.5}),
    (2, {"norm": math.nan}),
    (2, {"retention/a": 0.7}),
    (4, {"edit/p": 12.25, "time/edit": 3.5}),  # a step may commit two edits
    (4, {"norm": math.inf}),
    (4, {"final/a": 0.9}),
)
STEPS = (0, 1, 2, 4)


def read(folder: Path) -> Rows:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def log_calls(folder: Path, calls: Calls, save_after: int | None = None) -> RunCSVLogger:
    """Log, and leave the row at hand unwritten, as a process does that is killed."""
    logger = RunCSVLogger(str(folder))
    for number, (step, metrics) in enumerate(calls, 1):
        logger.log_metrics(metrics, step)
        if number == save_after:
            logger.save()
    return logger


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    """The file of a run that nothing has disturbed."""
    return logged(tmp_path / "whole", *CALLS).path.read_bytes()


def logged(folder: Path, *rows: tuple[int, dict[str, float]]) -> RunCSVLogger:
    logger = RunCSVLogger(str(folder))
    for step, metrics in rows:
        logger.log_metrics(metrics, step)
    logger.finalize("success")
    return logger


def test_values_of_one_step_share_a_row(tmp_path: Path) -> None:
    logged(tmp_path, (0, {"a": 1}), (1, {"a": 2}), (1, {"b": 3}), (1, {"a": 4}), (2, {"b": 5}))
    assert read(tmp_path) == [
        {"step": "0", "a": "1.0", "b": ""},
        {"step": "1", "a": "4.0", "b": "3.0"},
        {"step": "2", "a": "", "b": "5.0"},
    ]


def test_rows_are_on_disk_as_soon_as_the_next_step_begins(tmp_path: Path) -> None:
    logger = RunCSVLogger(str(tmp_path))
    logger.log_metrics({"a": 1}, 0)
    assert not logger.path.exists()
    logger.log_metrics({"a": 2}, 1)
    assert [row["step"] for row in read(tmp_path)] == ["0"]
    logger.save()
    assert [row["step"] for row in read(tmp_path)] == ["0", "1"]


def test_known_columns_are_appended_and_new_ones_rewrite_the_file(tmp_path: Path) -> None:
    logger = logged(tmp_path, (0, {"a": 1}), (1, {"a": 2}))
    inode = logger.path.stat().st_ino
    logger.log_metrics({"a": 3}, 2)
    logger.save()
    assert logger.path.stat().st_ino == inode
    logger.log_metrics({"c": 4}, 3)
    logger.save()
    assert logger.path.stat().st_ino != inode
    assert [row["a"] for row in read(tmp_path)] == ["1.0", "2.0", "3.0", ""]
    assert [row["c"] for row in read(tmp_path)] == ["", "", "", "4.0"]


@pytest.mark.parametrize("first", [0, 1, 2, 3, 4])
def test_a_resumed_run_replaces_rows_from_its_first_step_on(tmp_path: Path, first: int) -> None:
    logged(tmp_path, *((step, {"a": step, "old": 1}) for step in range(4)))
    logged(tmp_path, (first, {"a": 100, "new": 1}), (first + 1, {"a": 101}))
    rows = read(tmp_path)
    assert [row["step"] for row in rows] == [str(step) for step in range(first + 2)]
    assert [row["a"] for row in rows[first:]] == ["100.0", "101.0"]
    assert [row["a"] for row in rows[:first]] == [f"{float(step)}" for step in range(first)]
    assert rows[first]["new"] == "1.0"


def test_an_unfinished_last_line_is_replaced(tmp_path: Path) -> None:
    logger = logged(tmp_path, (0, {"a": 0, "b": 0}), (1, {"a": 1, "b": 1}))
    logger.path.write_text(logger.path.read_text() + "2,")  # the machine went down
    logged(tmp_path, (2, {"a": 2, "b": 2}))
    assert [row["step"] for row in read(tmp_path)] == ["0", "1", "2"]
    assert read(tmp_path)[-1] == {"step": "2", "a": "2.0", "b": "2.0"}


def test_more_about_a_step_that_was_saved_joins_its_row(tmp_path: Path) -> None:
    logger = logged(tmp_path, (0, {"a": 1}), (1, {"a": 2}))
    logger.log_metrics({"test/a": 3}, 1)  # trainer.test() after trainer.fit()
    logger.finalize("success")
    assert read(tmp_path) == [{"step": "0", "a": "1.0", "test/a": ""}, {"step": "1", "a": "2.0", "test/a": "3.0"}]


def test_without_a_step_values_join_the_row_at_hand(tmp_path: Path) -> None:
    logger = RunCSVLogger(str(tmp_path))
    logger.log_metrics({"a": 1}, 5)
    logger.log_metrics({"b": 2})
    logger.save()
    assert read(tmp_path) == [{"step": "5", "a": "1.0", "b": "2.0"}]


def test_numbers_come_back_exactly(tmp_path: Path) -> None:
    numbers = [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, math.inf]
    logger = logged(tmp_path, *((step, {"a": number}) for step, number in enumerate(numbers)))
    assert [float(row["a"]).hex() for row in read_rows(logger.path)[1]] == [number.hex() for number in numbers]


def test_names_may_hold_anything(tmp_path: Path) -> None:
    names = ['with "quotes", and commas', "line\nbreak", "Straße"]
    for step in range(3):
        logger = logged(tmp_path, (step, dict.fromkeys(names, step)))
    assert [row[name] for row in read_rows(logger.path)[1] for name in names] == [
        f"{s}.0" for s in (0, 1, 2) for _ in names
    ]


def test_an_earlier_step_joins_its_row(tmp_path: Path) -> None:
    logger = logged(
        tmp_path, *((step, {"a": step}) for step in range(4)), (1, {"a": 10}), (2, {"b": 20}), (4, {"a": 4})
    )
    assert [(row["step"], row["a"]) for row in read(tmp_path)] == [
        (str(s), f"{10 if s == 1 else s}.0") for s in range(5)
    ]
    assert read_rows(logger.path)[1][2]["b"] == "20.0"


# ---- killed and resumed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", range(len(CALLS)))
def test_a_killed_and_resumed_run_leaves_the_same_file(tmp_path: Path, whole: bytes, again: int) -> None:
    """A checkpoint was taken at any call, even between two of the same step; the process died at any later one."""
    for died in range(again, len(CALLS) + 1):
        folder = tmp_path / str(died)
        log_calls(folder, CALLS[:died], save_after=again)
        logger = logged(folder, *CALLS[again:])
        assert logger.path.read_bytes() == whole, f"died after call {died}"


def test_several_kills_in_a_row_leave_the_same_file(tmp_path: Path, whole: bytes) -> None:
    for again, died in ((0, 1), (0, 5), (3, 9), (5, 6), (6, 10), (10, 10)):
        log_calls(tmp_path, CALLS[again:died], save_after=max(1, min(2, died - again)))
    assert logged(tmp_path, *CALLS[6:]).path.read_bytes() == whole


def test_wherever_the_file_is_cut_a_resumed_run_completes_it(
    tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    path = tmp_path / "metrics.csv"
    for size in range(len(whole) + 1):
        rows_left = max(0, whole[:size].count(b"\n") - 1)
        for number, first in enumerate(STEPS):
            path.write_bytes(whole[:size])
            assert len(read_rows(path)[1]) == rows_left
            logged(tmp_path, *(call for call in CALLS if call[0] >= first))
            if number <= rows_left:  # no row is missing that the resumed run does not write
                assert path.read_bytes() == whole, f"cut at {size}, resumed at {first}"
            else:
                assert [int(row["step"]) for row in read(tmp_path)] == [*STEPS[:rows_left], *STEPS[number:]]


@pytest.mark.parametrize("end", [b"\0" * 40, b"2,\0\0", b"\0\0\r\n", b"\r\n", b'"', b"\xff\xfe\n", b"2,,0.\n"])
def test_what_a_power_cut_leaves_at_the_end_is_dropped(tmp_path: Path, whole: bytes, end: bytes) -> None:
    path = tmp_path / "metrics.csv"
    for rows_left in range(len(STEPS)):
        path.write_bytes(b"".join(whole.splitlines(keepends=True)[: rows_left + 1]) + end)
        logged(tmp_path, *(call for call in CALLS if call[0] >= STEPS[rows_left]))
        assert path.read_bytes() == whole


@pytest.mark.parametrize("damage", [b"", b"\0", b'"', b",,", b"x", b"\n", b"\xff", b"\r"])
def test_rows_that_cannot_be_read_are_dropped(tmp_path: Path, whole: bytes, damage: bytes) -> None:
    lines = whole.splitlines(keepends=True)
    lines[2] = lines[2][:1] + damage + lines[2][2:]
    (tmp_path / "metrics.csv").write_bytes(b"".join(lines))
    logged(tmp_path, (5, {"norm": 1}))
    assert [row["step"] for row in read(tmp_path)] == ["0", "2", "4", "5"]


@pytest.mark.parametrize("header", [b"", b"\0\0\0", b"st", b"step,a,a", b'"step,a', b"a,b", b"\xff\xff", b"step,a\0"])
@pytest.mark.parametrize("rest", [b"", b"\r\n", b"\r\n0,1.0,2.0\r\n", b"\0\0"])
def test_without_a_header_the_file_begins_anew(tmp_path: Path, header: bytes, rest: bytes) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(header + rest)
    logged(tmp_path, (1, {"b": 1}))
    assert path.read_bytes() == b"step,b\r\n1,1.0\r\n"


def test_columns_of_dropped_rows_go_with_them(tmp_path: Path) -> None:
    logged(tmp_path, (0, {"a": 1}), (1, {"late": 1}), (1, {"a": 2}))
    logged(tmp_path, (0, {"b": 1}))
    assert (tmp_path / "metrics.csv").read_text().split() == ["step,a,b", "0,1.0,1.0"]


# ---- disks that cannot be written ----------------------------------------------------------------------------------


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 1, 5])
@pytest.mark.parametrize("metrics", [{"a": 2.5}, {"new": 2.5}])
def test_a_full_disk_is_an_error_and_costs_no_row(tmp_path: Path, room: int, metrics: dict[str, float]) -> None:
    logger = logged(tmp_path, (0, {"a": 0.5}), (1, {"a": 1.5}))
    before = logger.path.read_bytes()
    logger.log_metrics(metrics, 2)
    with files_no_larger_than(len(before) + room), pytest.raises(OSError):
        logger.save()
    assert logger.path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
    logger.save()  # there is room again
    assert [row["step"] for row in read(tmp_path)] == ["0", "1", "2"]


def test_a_row_that_does_not_reach_the_disk_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logged(tmp_path, (0, {"a": 0.5}))
    before = logger.path.read_bytes()
    logger.log_metrics({"a": 1.5}, 1)

    def fail(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        logger.save()
    assert logger.path.read_bytes() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    before = logged(tmp_path, (0, {"a": 0.5})).path.read_bytes()
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            logged(tmp_path, (1, {"a": 1.5}))
    finally:
        tmp_path.chmod(0o700)
    assert (tmp_path / "metrics.csv").read_bytes() == before


# ---- the rest ------------------------------------------------------------------------------------------------------


def test_saving_nothing_writes_nothing(tmp_path: Path) -> None:
    logger = RunCSVLogger(str(tmp_path / "run"))
    logger.save()
    logger.finalize("success")
    assert list(tmp_path.iterdir()) == []


def test_it_names_the_run_folder(tmp_path: Path) -> None:
    logger = RunCSVLogger(str(tmp_path / "my-run"))
    logger.log_hyperparams({"a": 1})
    assert (logger.name, logger.version, logger.experiment) == ("my-run", "", logger)
    assert logger.save_dir == logger.log_dir == str(tmp_path / "my-run")
