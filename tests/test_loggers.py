"""metrics.csv of a run folder: one row per number of edits, complete after every crash."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from lit_edit.loggers import RunCSVLogger

pytestmark = pytest.mark.filterwarnings("ignore:Experiment logs directory:UserWarning")
Rows = list[dict[str, str]]


def read(folder: Path) -> Rows:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


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
