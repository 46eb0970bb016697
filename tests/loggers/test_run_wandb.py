"""What a run sends to wandb, read back from the offline file."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import sleep, time
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from lightning.pytorch.utilities import rank_zero_only

from lit_edit.cli.main import main
from lit_edit.loggers.run_csv import RunCSVLogger
from lit_edit.loggers.run_wandb import RunWandbLogger
from tests.cli.test_main import FAST
from tests.loggers.wandb_files import read_records, read_run

ROOT = Path(__file__).parents[2]
Rows = list[dict[str, Any]]


def run_fit(folder: Path, tiny_folder: Path, *args: str) -> dict[str, Any]:
    """Run a stream of three edits in ``runs/w`` with wandb, and return what wandb was sent."""
    base = ["fit", "--config", "quickstart", "--trainer.logger", "wandb", f"--model.language_model.name={tiny_folder}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_EDIT_CACHE", str(folder / "cache"))
        patch.delenv("WANDB_MODE")
        patch.chdir(folder)
        assert main([*base, *FAST, "--data.limit=3", "--run_name=w", "--trainer.accelerator=cpu", *args]) == 0
        return finished(folder / "runs" / "w")


def finished(folder: Path) -> dict[str, Any]:
    """Finish the wandb run and return what it was sent, when wandb's service, which takes its time, has it on disk."""
    import wandb

    wandb.finish()
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    for _ in range(500):
        if has_ended(path):
            break
        sleep(0.02)
    return read_run(folder)


def has_ended(path: Path) -> bool:
    """Tell whether a wandb file is whole; while it is being written its last block may not be, and cannot be read."""
    try:
        return any(record.WhichOneof("record_type") == "exit" for record in read_records(path))
    except DecodeError:
        return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wandb")


@pytest.fixture(scope="module")
def run(folder: Path, tiny_folder: Path) -> dict[str, Any]:
    return run_fit(folder, tiny_folder)


def test_curves_have_the_edit_count_as_axis(run: dict[str, Any]) -> None:
    rows = [row for row in run["history"] if "edit/target_probability" in row]
    assert [row["trainer/global_step"] for row in rows] == [1, 2, 3]
    norms = [row for row in run["history"] if any(name.startswith("norm/") for name in row)]
    assert {row["trainer/global_step"] for row in norms} == {0, 1, 2, 3}
    (final,) = [row for row in run["history"] if "final/efficacy/success" in row]
    assert final["trainer/global_step"] == 3


def test_the_config_is_there(run: dict[str, Any]) -> None:
    assert run["config"]["model"]["editor"]["class_path"] == "lit_edit.editors.D4S"
    assert run["config"]["data"]["limit"] == 3


def test_edits_and_figures_are_there(run: dict[str, Any]) -> None:
    names = {name for row in run["history"] for name in row}
    assert any(name.startswith("edits") for name in names)
    assert {f"figures/{name}" for name in ("metrics", "l1_norms", "forgetting")} <= {
        n.rpartition("/_")[0] or n for n in names
    }
    assert sum(path.endswith(".png") for path in run["files"]) == 3


# ---- killed and resumed --------------------------------------------------------------------------------------------

LAST = 6
CALLS = [
    (0, {"base/a": 0.1}),
    (0, {"norm": 1 / 3}),
    *(
        (step, metrics)
        for step in range(1, LAST + 1)
        for metrics in ({"edit/p": step / 7, "time/edit": -1.0}, {"norm": step / 3})
    ),
    (LAST, {"final/a": 0.9}),
]
Kinds = Sequence[Callable[..., Any]]
BOTH: Kinds = (RunCSVLogger, RunWandbLogger)


def log_calls(folder: Path, first: int, end: int, save_after: int | None = None, kinds: Kinds = BOTH) -> list[Any]:
    """Log some of the calls as a stream does, from a checkpoint to its death or end.

    Args:
        folder: The run folder.
        first: The first call; those before were made before the checkpoint.
        end: The call at which it dies.
        save_after: Write the rows to disk after this call: here the next checkpoint is taken.
        kinds: Of loggers, in the order in which they are used.
    """
    loggers = [kind(save_dir=str(folder)) for kind in kinds]
    for logger in loggers:
        logger.log_hyperparams({"limit": LAST, "started": time()})
    for number in range(first, end):
        step, metrics = CALLS[number]
        metrics = {name: time() if name == "time/edit" else value for name, value in metrics.items()}
        for logger in loggers:
            logger.log_metrics(dict(metrics), step=step)
            if number + 1 == save_after:
                logger.save()
    return loggers


def log_to_the_end(folder: Path, first: int = 0, kinds: Kinds = BOTH) -> dict[str, Any]:
    """Log the calls from one on, finish the run and return what wandb was sent."""
    for logger in log_calls(folder, first, len(CALLS), kinds=kinds):
        logger.finalize("success")
    return finished(folder)


def log_and_die(folder: Path, first: int, end: int, save_after: int) -> None:
    """Log calls in a process with a wandb service of its own and kill it: nothing can be written any more."""
    code = "from pathlib import Path; import tests.loggers.test_run_wandb as t; "
    code += f"t.log_calls(Path({str(folder)!r}), {first}, {end}, {save_after}); "
    code += "t.os.kill(t.os.getpid(), t.signal.SIGKILL)"
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment).returncode == -signal.SIGKILL


def lasting(rows: Rows) -> Rows:
    """Return rows without what differs from one run to the next."""
    passing = ("time/", "_timestamp", "_runtime")
    return [{name: value for name, value in row.items() if not name.startswith(passing)} for row in rows]


def ids(folder: Path) -> list[str]:
    return sorted(path.name.rpartition("-")[2] for path in folder.glob("wandb/**/offline-run-*"))


def set_aside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("wandb/interrupted/*"))


@pytest.fixture(autouse=True)
def _no_run_is_left() -> Iterator[None]:
    yield
    import wandb

    wandb.finish()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """The rows of a run that nothing has disturbed."""
    return lasting(log_to_the_end(tmp_path_factory.mktemp("whole") / "run")["history"])


def test_there_is_one_row_per_number_of_edits(whole: Rows) -> None:
    assert [row["_step"] for row in whole] == [row["trainer/global_step"] for row in whole] == list(range(LAST + 1))
    assert whole[0] == {"base/a": 0.1, "norm": 1 / 3, "trainer/global_step": 0, "_step": 0}
    assert whole[-1].keys() == {"edit/p", "norm", "final/a", "trainer/global_step", "_step"}


@pytest.mark.parametrize("kinds", [BOTH, BOTH[::-1]], ids=["csv first", "wandb first"])
@pytest.mark.parametrize(
    ("again", "died"),
    [(0, 1), (0, 7), (3, 7), (4, 9), (8, 8), (14, 15)],
    ids=["in the first row", "from the start", "within a row", "between rows", "at once", "at the last row"],
)
def test_a_resumed_run_has_the_same_rows(tmp_path: Path, whole: Rows, again: int, died: int, kinds: Kinds) -> None:
    log_calls(tmp_path, 0, died, save_after=again, kinds=kinds)
    earlier = finished(tmp_path)
    run = log_to_the_end(tmp_path, again, kinds)
    assert lasting(run["history"]) == whole
    times = {row["_step"]: row["time/edit"] for row in earlier["history"] if "time/edit" in row}
    assert all(row["time/edit"] == times[row["_step"]] for row in run["history"][1 : CALLS[again][0]])
    assert len(set(ids(tmp_path))) == 1
    assert len(ids(tmp_path)) == 2
    assert len(set_aside(tmp_path)) == 1
    assert run["config"]["limit"] == LAST


@pytest.mark.slow
def test_killed_processes_leave_a_whole_run_in_the_end(tmp_path: Path, whole: Rows) -> None:
    log_and_die(tmp_path, 0, 8, save_after=6)
    log_and_die(tmp_path, 6, 11, save_after=9)
    assert lasting(log_to_the_end(tmp_path, 9)["history"]) == whole
    assert len(set_aside(tmp_path)) == 2
    assert len(set(ids(tmp_path))) == 1


def test_several_attempts_within_a_second(tmp_path: Path, whole: Rows) -> None:
    """Wandb names the folder by the second, so that all have the same name."""
    log_calls(tmp_path, 0, 8, save_after=6)
    finished(tmp_path)
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    for name in (folder.name, f"{folder.name}-2"):
        shutil.copytree(folder, tmp_path / "wandb" / "interrupted" / name)
    assert lasting(log_to_the_end(tmp_path, 6)["history"]) == whole
    assert set_aside(tmp_path) == [folder.name, f"{folder.name}-2", f"{folder.name}-3"]


def test_half_a_line_in_metrics_csv_is_no_row(tmp_path: Path, whole: Rows) -> None:
    log_calls(tmp_path, 0, 10, save_after=10)
    finished(tmp_path)
    path = tmp_path / "metrics.csv"
    path.write_bytes(path.read_bytes()[:-4])
    assert lasting(log_to_the_end(tmp_path, 8)["history"]) == whole


def test_a_resumed_run_that_has_nothing_to_log_is_whole(tmp_path: Path, whole: Rows) -> None:
    log_to_the_end(tmp_path)
    assert lasting(log_to_the_end(tmp_path, len(CALLS))["history"]) == whole


@pytest.mark.parametrize("status", ["failed", "success"])
def test_a_run_that_fails_before_its_first_row_is_taken_up(tmp_path: Path, whole: Rows, status: str) -> None:
    for logger in log_calls(tmp_path, 0, 0):
        logger.finalize(status)
    finished(tmp_path)
    assert lasting(log_to_the_end(tmp_path)["history"]) == whole


def test_without_metrics_csv_earlier_rows_are_missing_and_it_says_so(
    tmp_path: Path, whole: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "lit_edit"):
        log_calls(tmp_path, 0, 8, kinds=[RunWandbLogger])
        finished(tmp_path)
        assert not caplog.messages
        run = log_to_the_end(tmp_path, 6, kinds=[RunWandbLogger])
    assert lasting(run["history"]) == whole[3:]
    (message,) = caplog.messages
    assert "metrics.csv is missing" in message
    assert str(tmp_path / "wandb" / "interrupted") in message
    assert len(set_aside(tmp_path)) == 1


def test_from_the_start_nothing_is_missing(tmp_path: Path, whole: Rows, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lit_edit"):
        log_calls(tmp_path, 0, 8, kinds=[RunWandbLogger])
        finished(tmp_path)
        assert lasting(log_to_the_end(tmp_path, kinds=[RunWandbLogger])["history"]) == whole
    assert not caplog.messages


def test_the_command_line_resumes_the_same_wandb_run(folder: Path, tiny_folder: Path, run: dict[str, Any]) -> None:
    before = ids(folder / "runs" / "w")
    again = run_fit(folder, tiny_folder, "--ckpt_path=runs/w/checkpoints/last.ckpt")
    assert ids(folder / "runs" / "w") == before * 2
    names = [[{n for n in row if not n.startswith("_")} for row in r["history"]] for r in (run, again)]
    assert names[0] == names[1]
    assert [row["_step"] for row in again["history"]] == [0, 1, 2, 3]
    assert again["config"]["data"]["limit"] == 3
    assert sum(path.endswith(".png") for path in again["files"]) == 3


# ---- the logger ----------------------------------------------------------------------------------------------------


class Server:
    """Stands for a wandb run that is online."""

    def __init__(self, resumed: bool, step: int) -> None:
        self.resumed, self.step = resumed, step
        self.rows: list[tuple[int, set[str]]] = []

    def log(self, metrics: dict[str, Any], step: int) -> None:
        assert step >= self.step, "wandb would warn and drop the row"
        self.step = step
        self.rows.append((step, set(metrics) - {"trainer/global_step"}))


@pytest.mark.parametrize("known", [0, 2, 3, 4, 6])
def test_a_server_is_sent_what_it_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: int) -> None:
    import wandb

    log_calls(tmp_path, 0, 10, save_after=8, kinds=[RunCSVLogger])
    server = Server(resumed=known > 0, step=known)
    monkeypatch.setattr(wandb, "init", lambda **kwargs: server)
    logger = RunWandbLogger(str(tmp_path))
    for step, metrics in CALLS[8:]:
        logger.log_metrics(metrics, step)
    steps = [step for step, names in server.rows if "edit/p" in names]
    assert steps == [*range(max(1, known), 4), *range(max(4, known), LAST + 1)]


def test_the_id_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(wandb, "init", lambda **kwargs: asked.append(kwargs) or Server(False, 0))
    for _ in range(2):
        assert RunWandbLogger(str(tmp_path / "my-run"), resume=None, group="g").experiment.step == 0
    kept = (tmp_path / "my-run" / "wandb" / "run_id").read_text()
    (id_,) = {arguments["id"] for arguments in asked}
    assert kept == f"{id_}\n"
    assert [(a["name"], a["resume"], a["group"]) for a in asked] == [("my-run", "allow", "g")] * 2
    for damaged in ("", "\0" * 9, "a/b"):
        (tmp_path / "my-run" / "wandb" / "run_id").write_text(damaged)
        assert RunWandbLogger(str(tmp_path / "my-run")).experiment.step == 0
        assert (tmp_path / "my-run" / "wandb" / "run_id").read_text() == f"{asked[-1]['id']}\n" != kept
    assert RunWandbLogger(str(tmp_path / "my-run"), id="mine", name="other").experiment.step == 0
    assert (asked[-1]["id"], asked[-1]["name"]) == ("mine", "other")
    assert (tmp_path / "my-run" / "wandb" / "run_id").read_text() == "mine\n"


def test_what_comes_late_joins_the_row_at_hand(tmp_path: Path) -> None:
    logger = RunWandbLogger(str(tmp_path))
    for step, metrics in ((0, {"a": 1}), (2, {"a": 2}), (1, {"test/a": 3}), (None, {"b": 4}), (3, {"a": 5})):
        logger.log_metrics(metrics, step)
    rows = lasting(finished(tmp_path)["history"])
    assert [(row["_step"], set(row) - {"_step", "trainer/global_step"}) for row in rows] == [
        (0, {"a"}),
        (2, {"a", "test/a", "b"}),
        (3, {"a"}),
    ]
    assert rows[1]["trainer/global_step"] == 2


def test_making_one_touches_nothing(tmp_path: Path) -> None:
    logger = RunWandbLogger(str(tmp_path / "run"))
    logger.finalize("success")
    assert logger.version is None
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_there_already_is_used_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,a\n0,1.0\n1,2.0\n")
    server = Server(False, 0)
    logger = RunWandbLogger(str(tmp_path), experiment=server, prefix="p")
    logger.log_metrics({"a": 3}, 2)
    assert server.rows == [(2, {"p-a"})]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_only_the_first_rank_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    log_calls(tmp_path / "run", 0, len(CALLS))
    assert list(tmp_path.iterdir()) == []
