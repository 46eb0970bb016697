"""Processes that die, disks that fill up, files that are damaged, two of a kind: nothing that counted is lost.

A run is killed by processes of its own, forked from one that has imported everything: a kill costs a second.
"""

from __future__ import annotations

import csv
import errno
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from lit_edit.callbacks import EditProgressBar, LayerNorms, RunFolder
from safetensors.torch import load_file, safe_open, save_file

from lit_edit.cli.main import main
from lit_edit.editors.closed_form.engine import ClosedFormEditor
from lit_edit.errors import counted
from lit_edit.files.trees import load_tree
from lit_edit.ledger.edit_ledger import EditLedger, EditRefusedError, weights_state
from lit_edit.ledger.journal import Journal
from lit_edit.loggers.run_csv import RunCSVLogger
from lit_edit.report.reading import read_run
from lit_edit.runs.files import deltas_path, journal_path, run_lock
from lit_edit.runs.folder import open_for_change, read_history
from lit_edit.runs.reading import read_log
from lit_edit.stream.edit_stream import EditStream
from tests.cli.test_main import FAST

ROOT = Path(__file__).parents[2]
EDITS = 4
CONFIG = """\
seed_everything: 0
model:
  language_model: {{name: {model}}}
  editor:
    class_path: lit_edit.editors.D4S
    init_args: {{layers: [1, 2], covariance_weight: 5, contexts: plain, target: {{steps: 3}}}}
  statistics: {{tokens: 0}}
data: {{source: builtin, limit: 4, target_window: 2}}
trainer:
  accelerator: cpu
  enable_progress_bar: false
  logger:
    - class_path: lit_edit.loggers.RunCSVLogger
  callbacks:
    - class_path: lit_edit.callbacks.EditProgressBar
    - class_path: lit_edit.callbacks.LayerNorms
      init_args: {{every: 1}}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args:
        every_n_train_steps: 1
        save_top_k: -1
        save_last: link
        save_on_exception: true
        enable_version_counter: false
    - class_path: lit_edit.callbacks.RunFolder
"""


# ---- runs, and what they leave behind --------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Runs of this process and of others are compared bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shared(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, and a cache that fills up."""
    folder = tmp_path_factory.mktemp("bad_days")
    (folder / "fast.yaml").write_text(CONFIG.format(model=tiny_folder))
    return folder


@pytest.fixture
def runs(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the runs of a test are; the process is in the folder above."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIT_EDIT_CACHE", str(shared / "cache"))
    monkeypatch.setattr(logging.root, "handlers", list(logging.root.handlers))
    return tmp_path / "runs"


def words(config: Path, *args: str) -> list[str]:
    return ["fit", "--config", str(config), *args]


@pytest.fixture
def fit(shared: Path, runs: Path) -> Callable[..., int]:
    """Run ``lit-edit fit`` in this process."""

    def run(*args: str, config: Path | None = None) -> int:
        try:
            return main(words(config or shared / "fast.yaml", *args))
        except SystemExit as stop:
            return int(stop.code or 0)

    return run


def left_by(folder: Path) -> dict[str, Any]:
    """All that a run leaves behind, without the times, which no two runs share."""
    summary = json.loads((folder / "summary.json").read_text())
    with (folder / "metrics.csv").open() as file:
        rows = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in csv.DictReader(file)]
    records = Journal(journal_path(folder), writable=False).records
    return {
        "deltas": {name: value.numpy().tobytes() for name, value in load_file(deltas_path(folder)).items()},
        "edits": (folder / "ledger" / "edits.jsonl").read_text(),
        "metrics": rows,
        "summary": {name: value for name, value in summary.items() if name != "seconds"},
        "records": [{name: value for name, value in record.items() if name != "time"} for record in records],
    }


def same_as(folder: Path, whole: Path) -> list[str]:
    """What a run has left that differs from another one."""
    one, other = left_by(folder), left_by(whole)
    return [name for name in one if one[name] != other[name]]


# ---- processes that die ----------------------------------------------------------------------------------------------


def child(args: list[str], folder: str, cache: str, die: tuple[str, int] | None, pace: float) -> None:
    """Run the command line in a process of its own, and perhaps die of SIGKILL.

    Args:
        args: For the command line.
        folder: Where.
        cache: lit-edit's cache.
        die: ``("write", n)``: at the n-th time that something becomes durable, just before or after it.
            ``("commit", n)``: just behind the n-th commit.
        pace: Seconds to wait at every commit.
    """
    os.chdir(folder)
    os.environ["LIT_EDIT_CACHE"] = cache
    out = open("child.log", "a")  # noqa: SIM115 - until the end of the process
    os.dup2(out.fileno(), 1)
    os.dup2(out.fileno(), 2)
    torch.set_num_threads(1)
    kind, limit = die or ("", 0)
    counts = {"write": 0, "commit": 0}

    def count(event: str) -> None:
        counts[event] += 1
        if event == kind and counts[event] == limit:
            os.kill(os.getpid(), signal.SIGKILL)

    def durable(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any, **options: Any) -> Any:
            count("write")
            result = function(*given, **options)
            count("write")
            return result

        return wrapped

    os.fsync, os.replace, os.rename, os.symlink = map(durable, (os.fsync, os.replace, os.rename, os.symlink))
    Path.replace = durable(Path.replace)  # type: ignore[method-assign]
    apply_edit = EditStream.apply_edit

    def apply(stream: EditStream, proposal: Any) -> None:
        apply_edit(stream, proposal)
        time.sleep(pace)
        count("commit")

    EditStream.apply_edit = apply  # type: ignore[method-assign]
    try:
        status = main(args)
    except SystemExit as stop:
        status = int(stop.code or 0)
    Path("writes.txt").write_text(str(counts["write"]))
    os._exit(status)


class Processes:
    """Starts the command line in forked processes; ends those that a test has left."""

    def __init__(self, cache: Path) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["pytest", "lit_edit.console.edit_cli", "lit_edit.callbacks"])
        self._cache = str(cache)
        self._started: list[Any] = []

    def start(self, args: list[str], folder: Path, die: tuple[str, int] | None = None, pace: float = 0.0) -> Any:
        process = self._context.Process(target=child, args=(args, str(folder), self._cache, die, pace))
        process.start()
        self._started.append(process)
        return process

    def run(self, args: list[str], folder: Path, die: tuple[str, int] | None = None) -> int:
        """Run to the end; return the exit status, negative for a signal."""
        process = self.start(args, folder, die)
        process.join(60)
        assert process.exitcode is not None, "it hangs"
        return int(process.exitcode)

    def end(self) -> None:
        for process in self._started:
            if process.is_alive():
                process.kill()
            process.join()
            process.close()


@pytest.fixture(scope="module")
def processes(shared: Path) -> Iterator[Processes]:
    started = Processes(shared / "cache")
    yield started
    started.end()


@pytest.fixture(scope="module")
def whole(shared: Path, processes: Processes) -> Path:
    """A run that was never interrupted. Not to be changed."""
    folder = shared / "whole"
    folder.mkdir()
    assert processes.run(words(shared / "fast.yaml", "--run_name=x"), folder) == 0, (folder / "child.log").read_text()
    return folder / "runs" / "x"


@pytest.fixture(scope="module")
def killed_once(shared: Path, processes: Processes) -> Path:
    """A run that was killed behind its third commit, before anything else was said of it. Not to be changed."""
    folder = shared / "killed"
    folder.mkdir()
    die = ("commit", 3)
    assert processes.run(words(shared / "fast.yaml", "--run_name=x"), folder, die) == -signal.SIGKILL
    return folder / "runs" / "x"


@pytest.fixture
def finished(whole: Path, runs: Path) -> Path:
    """A finished run, to do anything with."""
    return Path(shutil.copytree(whole, runs / "x", symlinks=True))


@pytest.fixture
def killed(killed_once: Path, runs: Path) -> Path:
    """A run that was killed, to do anything with."""
    return Path(shutil.copytree(killed_once, runs / "x", symlinks=True))


def resume(processes: Processes, shared: Path, folder: Path, die: tuple[str, int] | None = None) -> int:
    return processes.run(words(shared / "fast.yaml", "--run_name=x", "--resume=auto"), folder, die)


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_any_write_and_started_again(
    seed: int, shared: Path, whole: Path, processes: Processes, tmp_path: Path
) -> None:
    """At each of these instants the disk holds something else; the very same command goes on from all of them."""
    rng = random.Random(seed)
    writes = int((shared / "whole" / "writes.txt").read_text())
    kills = 0
    # The first comes while the run starts; the others somewhere in what is left.
    while resume(processes, shared, tmp_path, ("write", rng.randint(1, 8 if kills == 0 else writes // 2))) != 0:
        kills += 1
        assert kills < 20
    assert kills >= 3
    assert same_as(tmp_path / "runs" / "x", whole) == []


def test_killed_at_any_time_and_started_again(
    shared: Path, whole: Path, processes: Processes, tmp_path: Path
) -> None:  # fmt: skip
    rng, started = random.Random(2), time.time()
    args = words(shared / "fast.yaml", "--run_name=x", "--resume=auto")
    for _ in range(3):
        process = processes.start(args, tmp_path, pace=0.1)
        process.join(rng.uniform(0.05, 1.5))
        process.kill()
        process.join()
    assert resume(processes, shared, tmp_path) == 0
    assert same_as(tmp_path / "runs" / "x", whole) == []
    assert time.time() - started < 60


def test_what_a_killed_process_was_writing_does_not_pile_up(
    shared: Path, processes: Processes, tmp_path: Path
) -> None:  # fmt: skip
    """Half a checkpoint is as large as a whole one."""
    assert resume(processes, shared, tmp_path, ("commit", 1)) == -signal.SIGKILL
    run = tmp_path / "runs" / "x"
    (run / "checkpoints").mkdir(exist_ok=True)
    half = run / "checkpoints" / ".epoch=0-step=1.ckpt.ab12.part"
    half.write_bytes(b"half a checkpoint")
    mine = run / "notes.part"
    mine.write_text("mine")
    assert resume(processes, shared, tmp_path) == 0
    assert not half.exists()
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_an_undo_that_is_killed_happened_or_not(
    share: float, finished: Path, processes: Processes, tmp_path: Path, capfd: Any
) -> None:
    args = ["undo", "--run", str(finished), "--edit", "2", "--no-measure"]
    spare = Path(shutil.copytree(finished, tmp_path / "spare" / "x", symlinks=True))
    assert processes.run([*args[:2], str(spare), *args[3:]], tmp_path) == 0
    writes = int((tmp_path / "writes.txt").read_text())
    assert processes.run(args, tmp_path, ("write", max(1, round(share * writes)))) == -signal.SIGKILL
    assert main(["ask", "--run", str(finished), "Hello there", "--tokens", "1"]) == 0
    live = [entry.number for entry in read_history(finished).live]
    assert live in ([1, 2, 3, 4], [1, 3, 4])
    with safe_open(deltas_path(finished), "pt") as file:
        state = file.metadata()["state"]
    assert state == weights_state(Journal(journal_path(finished), writable=False))
    other = load_file(deltas_path(spare))
    same = all(torch.equal(value, other[name]) for name, value in load_file(deltas_path(finished)).items())
    assert same == (live == [1, 3, 4])


# ---- where a run goes on ---------------------------------------------------------------------------------------------


def test_resume_without_a_name_finds_the_run_by_its_settings(killed: Path, fit: Any, whole: Path) -> None:
    assert fit("--resume=auto") == 0
    assert [path.name for path in killed.parent.iterdir()] == ["x"]
    assert same_as(killed, whole) == []


def test_resume_with_the_config_of_a_run_finds_that_run(
    killed: Path, fit: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert fit("--resume=auto", config=killed / "config.yaml") == 0
    assert same_as(killed, whole) == []
    assert list(elsewhere.iterdir()) == []


def test_resuming_again_takes_the_newest_checkpoint(
    killed: Path, fit: Any, whole: Path, shared: Path, processes: Processes, tmp_path: Path
) -> None:
    """What the first resume began from may be gone by then."""
    (killed / "checkpoints" / "epoch=0-step=2.ckpt").unlink()
    args = words(killed / "config.yaml", "--resume=auto")
    assert processes.run(args, tmp_path, ("commit", 1)) == -signal.SIGKILL
    (killed / "checkpoints" / "epoch=0-step=1.ckpt").unlink()
    assert fit("--resume=auto", config=killed / "config.yaml") == 0
    assert same_as(killed, whole) == []


def test_resume_with_other_settings_begins_another_run(killed: Path, fit: Any) -> None:
    recorded = journal_path(killed).read_bytes()
    assert fit("--resume=auto", "--model.editor.init_args.covariance_weight=6") == 0
    assert len(list(killed.parent.iterdir())) == 2
    assert journal_path(killed).read_bytes() == recorded


@pytest.mark.parametrize("checkpoints", [True, False])
def test_the_bar_of_a_resumed_run_knows_its_total_and_its_rate(
    checkpoints: bool, killed: Path, fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not checkpoints:
        shutil.rmtree(killed / "checkpoints")
    seen: list[tuple[int, int, int | None]] = []
    end = EditProgressBar.on_train_batch_end

    def look(bar: EditProgressBar, *args: Any) -> None:
        end(bar, *args)
        seen.append((bar.train_progress_bar.n, bar.train_progress_bar.initial, bar.train_progress_bar.total))

    monkeypatch.setattr(EditProgressBar, "on_train_batch_end", look)
    assert fit("--run_name=x", "--resume=auto", "--trainer.enable_progress_bar=true") == 0
    last, first, total = seen[-1]
    assert (last, total) == (EDITS, EDITS)
    assert 2 <= first < EDITS  # the rate is of the edits that this process has made


def test_resume_where_there_is_nothing_begins(runs: Path, fit: Any, whole: Path) -> None:
    assert fit("--resume=auto", "--run_name=x") == 0
    assert same_as(runs / "x", whole) == []


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.mark.parametrize("named", [True, False])
def test_a_run_that_has_ended_is_left_alone(finished: Path, fit: Any, named: bool, capsys: Any) -> None:
    before = contents(finished)
    assert fit("--resume=auto", *(["--run_name=x"] if named else [])) == 0
    assert contents(finished) == before
    assert "has come to its end already" in capsys.readouterr().out
    assert [path.name for path in finished.parent.iterdir()] == ["x"]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--data.offset=1"], "resume with the data it was made with"),
        (["--data.limit=2"], "resume with the data it was made with"),
        (["--data.shuffle_seed=3"], "resume with the data it was made with"),
        (["--seed_everything=7"], "made with other settings (seed_everything 0, now 7)"),
        (["--model.editor.init_args.covariance_weight=6"], "made with other settings (covariance_weight 5.0, now 6.0)"),
        (["--model.editor.init_args.target.steps=4"], "made with other settings (target.steps 3, now 4)"),
        (["--model.statistics.tokens=9"], "made with other settings (model.statistics.tokens 0, now 9)"),
        (["--model.language_model.name=gone"], "now 'gone')"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_run_that_has_ended_refuses_what_a_cut_one_refuses(
    args: list[str], told: str, finished: Path, fit: Any, capsys: Any
) -> None:
    before = contents(finished)
    assert fit("--run_name=x", "--resume=auto", *args) == 2
    assert told in capsys.readouterr().err
    assert contents(finished) == before


def test_another_seed_is_refused_on_a_cut_run_too(killed: Path, fit: Any, capsys: Any) -> None:
    before = contents(killed)
    assert fit("--run_name=x", "--resume=auto", "--seed_everything=7") == 2
    assert "made with other settings (seed_everything 0, now 7)" in capsys.readouterr().err
    assert contents(killed)["ledger/journal"] == before["ledger/journal"]


@pytest.mark.parametrize("checkpoints", [True, False])
def test_more_data_behind_the_same_beginning_is_gone_on_with(
    checkpoints: bool,
    finished: Path,
    shared: Path,
    processes: Processes,
    fit: Any,
    runs: Path,
    tmp_path: Path,
    capsys: Any,
) -> None:
    """Whole windows: as one run of all of them, but for the measurements at the first end."""
    assert fit("--run_name=long", "--data.limit=6") == 0
    if not checkpoints:
        shutil.rmtree(finished / "checkpoints")
    args = [*words(shared / "fast.yaml"), "--runs_dir", str(runs), "--run_name=x", "--resume=auto", "--data.limit=6"]
    assert processes.run(args, tmp_path, ("commit", 1 if checkpoints else 5)) == -signal.SIGKILL
    assert len(read_history(finished).made) == 5
    assert fit("--run_name=x", "--resume=auto", "--data.limit=6") == 0
    assert "has come to its end already" not in capsys.readouterr().out
    assert len(read_history(finished).made) == 6
    one, other = load_file(deltas_path(finished)), load_file(deltas_path(runs / "long"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (finished, runs / "long")]
    assert summaries[0]["final"] == summaries[1]["final"]
    assert summaries[0]["edits"] == 6
    before = contents(finished)
    assert fit("--run_name=x", "--resume=auto", "--data.limit=6") == 0
    assert "has come to its end already" in capsys.readouterr().out
    assert contents(finished) == before


def test_an_ended_run_is_not_run_again_unasked(finished: Path, fit: Any, capsys: Any) -> None:
    before = contents(finished)
    assert fit("--run_name=x") == 2
    assert "go on where it was cut with --resume auto" in capsys.readouterr().err
    assert contents(finished) == before


# ---- disks that are full, folders that cannot be written -------------------------------------------------------------


def no_space(*args: object, **options: object) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device", "somewhere")


def fill_journal(patch: pytest.MonkeyPatch) -> None:
    append = Journal.append

    def full(journal: Journal, record: Any, tensors: Any = None) -> int:
        return no_space() if len(journal) == 3 else append(journal, record, tensors)

    patch.setattr(Journal, "append", full)


def fill_checkpoints(patch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"a part")
        no_space()

    patch.setattr("lit_edit.files.tensor_files.save_file", full)


def fill_logs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RunCSVLogger, "_append", no_space)


def fill_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("lit_edit.export.model.save_deltas", no_space)


@pytest.mark.parametrize("fill", [fill_journal, fill_checkpoints, fill_logs, fill_end])
def test_a_full_disk_ends_the_run_in_a_sentence_and_it_goes_on_later(
    fill: Callable[..., None], runs: Path, fit: Any, whole: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fill(patch)
        assert fit("--run_name=x") == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line.lower()]
    assert len(errors) == 1
    assert errors[0].startswith("lit-edit: error: the disk is full")
    assert list(runs.rglob("*.part")) == []
    assert fit("--run_name=x", "--resume=auto") == 0
    assert same_as(runs / "x", whole) == []


@pytest.mark.parametrize("where", ["runs", "runs/x", "runs/x/ledger"])
def test_a_file_where_a_folder_should_be(where: str, runs: Path, fit: Any, capsys: Any) -> None:
    place = runs.parent / where
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("in the way")
    assert fit("--run_name=x", "--resume=auto") == 2
    err = capsys.readouterr().err
    assert "lit-edit: error:" in err
    assert "Traceback" not in err
    assert place.read_text() == "in the way"


@pytest.mark.parametrize("command", ["fit", "undo"])
def test_a_run_folder_that_cannot_be_written(
    command: str, killed: Path, fit: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def read_only(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if str(path).startswith(str(killed)) and flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, flags, *args, **options)

    before = contents(killed)
    monkeypatch.setattr(os, "open", read_only)
    status = fit("--run_name=x", "--resume=auto") if command == "fit" else main(["undo", f"--run={killed}", "--last=1"])
    assert status == 2
    err = capsys.readouterr().err
    assert f"{killed} cannot be written: Read-only file system" in err
    assert contents(killed) == before


# ---- files that are damaged ------------------------------------------------------------------------------------------


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_last_bit(path: Path) -> None:
    """Change one bit of a file's last tensor."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage", ["the newest", "a bit of the newest", "all", "a bit of all", "gone", "of another run"]
)
def test_a_damaged_checkpoint_is_not_needed(
    damage: str, killed: Path, fit: Any, whole: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = killed / "checkpoints"
    checkpoints = sorted(folder.glob("epoch*.ckpt"))
    assert len(checkpoints) == 2  # the third edit is in the journal alone
    if damage == "gone":
        shutil.rmtree(folder)
    elif damage == "of another run":
        shutil.copy(whole / "checkpoints" / "epoch=0-step=4.ckpt", folder / "epoch=0-step=9.ckpt")
    else:
        for path in checkpoints[-1:] if damage.endswith("the newest") else checkpoints:
            (flip_last_bit if "bit" in damage else cut_in_half)(path)
    used: list[int] = []
    restore = EditStream.restore
    monkeypatch.setattr(
        EditStream,
        "restore",
        lambda stream, saved: (used.append(len(saved["results"]["immediate"])), restore(stream, saved)),
    )
    with caplog.at_level(logging.WARNING):
        assert fit("--run_name=x", "--resume=auto") == 0
    assert used == {"newest": [1], "all": [], "gone": [], "run": [2]}[damage.split()[-1]]
    assert ("is damaged and not used" in caplog.text) == damage.endswith(("the newest", "all"))
    assert (f"{checkpoints[-1]} is damaged" in caplog.text) == damage.endswith(("the newest", "all"))
    assert ("is not what was written: bits have changed" in caplog.text) == ("bit" in damage)
    assert same_as(killed, whole) == []


@pytest.mark.parametrize("damage", ["cut", "flipped", "zeros"])
@pytest.mark.parametrize("records", [0, 1])
def test_a_journal_with_a_damaged_end_is_recovered(
    damage: str, records: int, killed: Path, fit: Any, whole: Path
) -> None:
    """Also where a checkpoint knows of an edit that the journal has lost: an older one is used, the edit made again."""
    path = journal_path(killed)
    if records:  # the file ends with the second edit, which the newest checkpoint has
        journal = Journal(path)
        journal._cut(journal._places[-2].offset + journal._places[-2].length)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[-100:]
    elif damage == "flipped":
        data[-100] ^= 1
    else:
        data[-2000:] = b"\0" * 2000
    path.write_bytes(data)
    assert fit("--run_name=x", "--resume=auto") == 0
    assert same_as(killed, whole) == []


def damage_middle(folder: Path) -> bytes:
    """Damage the second record, and return the file."""
    journal = Journal(journal_path(folder), writable=False)
    data = bytearray(journal.as_bytes())
    data[journal._places[1].offset + 50] ^= 1
    journal_path(folder).write_bytes(data)
    return bytes(data)


@pytest.mark.parametrize("end", ["killed", "finished"])
def test_a_journal_damaged_in_its_middle_is_repaired_by_resume_alone(
    end: str, request: pytest.FixtureRequest, fit: Any, whole: Path, capsys: Any
) -> None:
    folder: Path = request.getfixturevalue(end)
    damaged = damage_middle(folder)
    for args in (["log"], ["undo", "--last=1"], ["redo", "--edit=1"]):
        assert main([*args, f"--run={folder}"]) == 2
        assert "record 2 (at byte" in capsys.readouterr().err
    assert journal_path(folder).read_bytes() == damaged
    assert fit("--run_name=x", "--resume=auto") == 0
    assert same_as(folder, whole) == []
    aside = journal_path(folder).with_name("journal.damaged").read_bytes()
    assert damaged.endswith(aside)
    assert len(aside) > 1000


def test_a_journal_that_is_none_is_refused(killed: Path, fit: Any, capsys: Any) -> None:
    journal_path(killed).write_bytes(b"my diary")
    for command in (lambda: fit("--run_name=x", "--resume=auto"), lambda: main(["log", f"--run={killed}"])):
        assert command() == 2
        assert "is not a journal of lit-edit" in capsys.readouterr().err
    assert journal_path(killed).read_bytes() == b"my diary"


@pytest.mark.parametrize("damage", ["half", "bit", "not finite"])
def test_damaged_key_statistics_are_computed_anew(
    damage: str, killed: Path, fit: Any, whole: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Path(shutil.copytree(shared / "cache", tmp_path / "cache"))
    monkeypatch.setenv("LIT_EDIT_CACHE", str(cache))
    files = sorted(cache.rglob("layer*.safetensors"))
    assert len(files) == 2
    good = load_file(files[0])["moment"].clone()  # not the file itself, which is damaged now
    if damage in ("half", "bit"):
        {"half": cut_in_half, "bit": flip_last_bit}[damage](files[0])
    else:
        save_file({"moment": good * torch.nan}, files[0])
    assert fit("--run_name=x", "--resume=auto") == 0
    assert same_as(killed, whole) == []
    assert torch.equal(load_file(files[0])["moment"], good)


@pytest.mark.parametrize("damage", ["half", "bit", "gone"])
def test_damaged_updates_are_written_anew_from_the_journal(damage: str, finished: Path, whole: Path) -> None:
    path = deltas_path(finished)
    {"half": cut_in_half, "bit": flip_last_bit, "gone": Path.unlink}[damage](path)
    assert main(["ask", f"--run={finished}", "Hello there", "--tokens=1"]) == 0
    assert same_as(finished, whole) in ([], ["edits"])  # whose last marks are not measured again
    assert load_file(path).keys() == load_file(deltas_path(whole)).keys()


# ---- other models, other settings ------------------------------------------------------------------------------------


def test_changed_base_weights_are_refused(
    shared: Path, tiny_folder: Path, runs: Path, fit: Any, tmp_path: Path, capsys: Any
) -> None:
    model = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    name = f"--model.language_model.name={model}"
    assert fit("--run_name=x", name, "--data.limit=2") == 0
    folder = runs / "x"
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-6
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    shutil.rmtree(folder / "checkpoints")
    for end in ("with the end", "without"):
        if end == "without":  # for a run that has ended there is nothing to do
            journal = Journal(journal_path(folder))
            journal._cut(journal._places[-2].offset + journal._places[-2].length)
        before = contents(folder)
        commands = [["undo", "--last=1"], ["ask", "Hello there"]]
        statuses = [main([*args, f"--run={folder}"]) for args in commands]
        if end == "without":
            statuses.append(fit("--run_name=x", "--resume=auto", name, "--data.limit=2"))
        err = capsys.readouterr().err
        assert set(statuses) == {2}
        assert err.count("other base weights") == len(statuses), err
        after = contents(folder)
        assert {name for name in after if after[name] != before.get(name)} <= {"metrics.csv", *checkpoints_in(after)}
        assert after.keys() >= before.keys()


def checkpoints_in(names: Iterable[str]) -> set[str]:
    """What a run that fails at its start may leave: a checkpoint of nothing."""
    return {name for name in names if name.startswith("checkpoints/")}


def test_a_checkpoint_of_other_base_weights_is_refused(
    killed: Path, shared: Path, tiny_folder: Path, fit: Any, tmp_path: Path, capsys: Any
) -> None:
    model = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-6
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    recorded = journal_path(killed).read_bytes()
    assert fit("--run_name=x", "--resume=auto", f"--model.language_model.name={model}") == 2
    assert "other base weights" in capsys.readouterr().err
    assert journal_path(killed).read_bytes() == recorded


@pytest.mark.parametrize("checkpoints", [True, False])
def test_other_settings_are_refused_by_name_and_the_run_stays_as_it_is(
    checkpoints: bool, killed: Path, fit: Any, whole: Path, capsys: Any
) -> None:
    if not checkpoints:
        shutil.rmtree(killed / "checkpoints")
    before = contents(killed)
    assert fit("--run_name=x", "--resume=auto", "--model.editor.init_args.covariance_weight=6") == 2
    assert "made with other settings (covariance_weight 5.0, now 6.0" in capsys.readouterr().err
    after = contents(killed)
    assert after["config.yaml"] == before["config.yaml"]
    assert after["ledger/journal"] == before["ledger/journal"]
    assert fit("--resume=auto", config=killed / "config.yaml") == 0
    assert same_as(killed, whole) == []


def test_other_data_is_refused(killed: Path, fit: Any, capsys: Any) -> None:
    recorded = journal_path(killed).read_bytes()
    assert fit("--run_name=x", "--resume=auto", "--data.offset=1") == 2
    assert "resume with the data it was made with" in capsys.readouterr().err
    assert journal_path(killed).read_bytes() == recorded


# ---- two processes ---------------------------------------------------------------------------------------------------


def test_a_second_process_is_kept_out(killed: Path, fit: Any, whole: Path, capsys: Any) -> None:
    before = contents(killed)
    with run_lock(killed):
        for command in (
            lambda: fit("--run_name=x", "--resume=auto"),
            lambda: fit("--run_name=x", "--overwrite=true"),
            lambda: main(["undo", f"--run={killed}", "--last=1"]),
        ):
            assert command() == 2
            assert f"another process is working in {killed}" in capsys.readouterr().err
        assert main(["log", f"--run={killed}"]) == 0  # looking is free
        assert contents(killed) == before
    assert fit("--run_name=x", "--resume=auto") == 0
    assert same_as(killed, whole) == []


def test_a_process_from_the_shell_is_kept_out_by_one_that_runs(
    shared: Path, processes: Processes, runs: Path, tmp_path: Path
) -> None:
    running = processes.start(words(shared / "fast.yaml", "--run_name=x"), tmp_path, pace=30)
    wait_for(lambda: len(records_of(runs / "x")) > 1)
    command = [sys.executable, "-m", "lit_edit", *words(shared / "fast.yaml", "--run_name=x", "--resume=auto")]
    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    running.kill()
    running.join()
    assert second.returncode == 2, second.stderr
    assert "another process is working in" in second.stderr
    assert "Traceback" not in second.stderr
    with run_lock(runs / "x"):  # a process that was killed holds nothing
        pass


def records_of(folder: Path) -> list[Any]:
    try:
        return Journal(journal_path(folder), writable=False).records
    except ValueError:
        return []


def wait_for(happened: Callable[[], bool], seconds: float = 30) -> None:
    end = time.time() + seconds
    while not happened():
        assert time.time() < end, "it did not happen"
        time.sleep(0.02)


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pause", [0.0, 0.1])
def test_ctrl_c_twice_ends_the_run_at_once_and_nothing_is_lost(
    pause: float, shared: Path, whole: Path, processes: Processes, tmp_path: Path
) -> None:
    running = processes.start(words(shared / "fast.yaml", "--run_name=x"), tmp_path, pace=0.3)
    wait_for(lambda: len(records_of(tmp_path / "runs" / "x")) > 2)
    for _ in range(2):
        with suppress(ProcessLookupError):  # it may be that quick
            os.kill(running.pid, signal.SIGINT)
        time.sleep(pause)
    running.join(10)
    assert running.exitcode == 130
    said = (tmp_path / "child.log").read_text()
    assert "--resume auto" in said
    assert "Traceback" not in said
    assert len(records_of(tmp_path / "runs" / "x")) < 2 + EDITS
    assert resume(processes, shared, tmp_path) == 0
    assert same_as(tmp_path / "runs" / "x", whole) == []


class Cut(Exception):  # noqa: N818 - of power
    """Ends a run at a place of its own."""


def cut_at(place: str, patch: pytest.MonkeyPatch) -> None:
    """Let the third edit be made, and something happen while the rest of its step is done."""
    if place == "a signal in the commit":
        accept = ClosedFormEditor.accept

        def accepting(editor: Any, proposal: Any) -> None:
            if proposal.entries[0].number == 3:
                signal.raise_signal(signal.SIGINT)
            accept(editor, proposal)

        patch.setattr(ClosedFormEditor, "accept", accepting)
        return
    owner, name = {
        "the measurement": (EditStream, "_measure_immediate"),
        "a callback before its log": (LayerNorms, "go_on"),
        "a callback behind all logs": (RunFolder, "on_train_batch_end"),
    }[place]
    real = getattr(owner, name)

    def cutting(self: Any, *args: Any) -> Any:
        stream = next(part for part in (self, *args) if isinstance(part, EditStream))
        if stream.edits_made == 3:
            raise Cut
        return real(self, *args)

    patch.setattr(owner, name, cutting)


@pytest.mark.parametrize(
    "place",
    ["a signal in the commit", "the measurement", "a callback before its log", "a callback behind all logs"],
)
def test_a_run_that_ends_in_the_middle_of_a_step_does_the_rest_of_it_later(
    place: str, runs: Path, fit: Any, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The edit is in the weights and in the checkpoint of the exception, but its measurements and logs are not."""
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        cut_at(place, patch)
        if place == "a signal in the commit":
            assert fit("--run_name=x") == 130
        else:
            with pytest.raises(Cut):
                fit("--run_name=x")
    signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
    assert len(records_of(runs / "x")) == 4
    saved = load_tree(runs / "x" / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == len(saved["lit_edit"]["ledger"]["history"]["made"]) == 3
    assert fit("--run_name=x", "--resume=auto") == 0
    assert same_as(runs / "x", whole) == []
    assert load_tree(runs / "x" / "checkpoints" / "last.ckpt")["global_step"] == EDITS


# ---- undo, redo, log -------------------------------------------------------------------------------------------------


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ledger" / "edits.jsonl").read_text().splitlines()]


def held(folder: Path) -> list[int]:
    live = [entry.number for entry in read_history(folder).live]
    assert [row["number"] for row in rows_of(folder) if row["status"] == "holds"] == live
    return live


def subject_of(folder: Path, number: int) -> str:
    return read_history(folder).entry(number).subject


@pytest.mark.parametrize(
    ("args", "out"),
    [
        (["--edit=2"], [2]),
        (["--edit=1,3", "--edit=3-4"], [1, 3, 4]),
        (["--last=2"], [3, 4]),
        (["--subject", "{1}"], [1]),
        (["--id", "{id3}", "--last=1"], [3, 4]),
    ],
    ids=["number", "numbers and ranges", "last", "subject", "id and last"],
)
def test_undo_takes_out_what_was_named(args: list[str], out: list[int], finished: Path, capsys: Any) -> None:
    history = read_history(finished)
    names = {"{1}": f" {history.entry(1).subject.upper()} ", "{id3}": history.entry(3).id}
    assert main(["undo", f"--run={finished}", "--no-measure", *(names.get(arg, arg) for arg in args)]) == 0
    assert held(finished) == [number for number in range(1, 5) if number not in out]
    told = " ".join(capsys.readouterr().out.split())
    assert f"{counted(len(out), 'edit')} taken out, {EDITS - len(out)} in the model" in told
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["edits"], summary["undone"]) == (EDITS - len(out), len(out))
    assert "before" in summary["stale"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "name the edits"),
        (["--edit=5"], "there is no edit 5; the edits of this ledger are 1 to 4"),
        (["--edit=0"], "there is no edit 0"),
        (["--edit=2-1"], "expected numbers like 17"),
        (["--edit=2-"], "expected numbers like 17"),
        (["--edit=x"], "expected numbers like 17"),
        (["--edit=1-99999999999999"], "too many numbers"),
        (["--last=0"], "--last 0: 4 edits are in the model"),
        (["--last=5"], "--last 5: 4 edits are in the model"),
        (["--subject=Nobody"], "--subject Nobody: there is no such edit"),
        (["--id=nothing"], "--id nothing: there is no such edit"),
        (["--edit=1", "--id=nothing"], "--id nothing: there is no such edit"),
    ],
)
def test_undo_of_what_there_is_not_changes_nothing(
    args: list[str], message: str, finished: Path, capsys: Any
) -> None:  # fmt: skip
    before = contents(finished)
    assert main(["undo", f"--run={finished}", *args]) == 2
    assert message in capsys.readouterr().err
    assert contents(finished) == before


@pytest.mark.parametrize("args", [["--edit=1"], ["--last=1"]])
def test_redo_of_what_holds_changes_nothing(args: list[str], finished: Path, capsys: Any) -> None:
    before = contents(finished)
    assert main(["redo", f"--run={finished}", *args]) == 2
    assert "in the model already" in (err := capsys.readouterr().err) or "there is nothing to redo: no edit" in err
    assert contents(finished) == before


def test_commands_without_a_run(runs: Path, capsys: Any) -> None:
    for command in ("undo", "redo", "log"):
        args = [] if command == "log" else ["--last=1"]
        assert main([command, f"--run={runs / 'gone'}", *args]) == 2
        assert "there is no run folder" in capsys.readouterr().err
    runs.mkdir()
    assert main(["log", f"--run={runs}"]) == 2
    assert "has no journal" in capsys.readouterr().err


def test_undo_and_redo_are_seen_by_everyone(finished: Path, whole: Path, tmp_path: Path, capsys: Any) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    (finished / "summary.json").write_text(json.dumps(summary | {"ability": {"final": {}}, "age_curves": {}}))
    assert main(["undo", f"--run={finished}", "--edit=1,4"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "2 edits taken out, 2 in the model" in told
    assert "efficacy success" in told
    assert "measured over the 2 in the model" in told
    assert "Later edits were made on a model that had these" in told
    assert "undo --exact makes the later edits again" in told
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["edits"], summary["undone"], "stale" in summary) == (2, 2, False)
    assert "ability" not in summary  # of the model with all edits, and not measured again
    assert summary["before_change"] == {"ability": {"final": {}}, "age_curves": {}}
    assert [row["status"] for row in rows_of(finished)] == ["undone", "holds", "holds", "undone"]
    assert ["final_success" in row for row in rows_of(finished)] == [False, True, True, False]

    assert main(["ask", f"--run={finished}", "Hello there", "--tokens=1"]) == 0
    assert "after 2 edits" in capsys.readouterr().out
    assert main(["export", f"--run={finished}", f"--to={tmp_path / 'out'}"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "with 2 facts changed" in card
    assert subject_of(finished, 2) in card
    assert f"| {subject_of(finished, 1)} |" not in card
    deltas, before = load_file(deltas_path(finished)), load_file(deltas_path(whole))
    exported = load_file(tmp_path / "out" / "model.safetensors")
    base = load_file(Path(json.loads(json.dumps(config_of(finished)))) / "model.safetensors")
    for name, delta in deltas.items():
        assert torch.equal(exported[name], (base[name].double() + delta).float())
        assert not torch.allclose(delta, before[name], atol=1e-6)

    assert main(["redo", f"--run={finished}", "--edit=4", "--edit=1"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "2 edits put back, 4 in the model" in told
    assert "meanwhile" not in told  # nothing else was done
    for name, delta in load_file(deltas_path(finished)).items():
        torch.testing.assert_close(delta, before[name], rtol=1e-8, atol=1e-10)
    assert held(finished) == [1, 2, 3, 4]
    final = [json.loads((folder / "summary.json").read_text())["final"] for folder in (finished, whole)]
    assert final[0]["efficacy"] == pytest.approx(final[1]["efficacy"], rel=1e-4)


def config_of(folder: Path) -> str:
    import yaml

    return str(yaml.safe_load((folder / "config.yaml").read_text())["model"]["language_model"]["name"])


@pytest.mark.parametrize("exact", [True, False])
def test_exact_undo_is_a_run_without_the_edit(
    exact: bool, finished: Path, fit: Any, runs: Path, capsys: Any
) -> None:  # fmt: skip
    history = read_history(finished)
    facts = runs.parent / "facts.jsonl"
    requests = [history.entry(number).request for number in (1, 3, 4)]
    rows = [{name: r[name] for name in ("id", "prompt", "subject", "target_new", "target_true")} for r in requests]
    facts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["--data.source=facts", f"--data.path={facts}", "--data.target_window=1"]
    assert fit("--run_name=without", *args) == 0
    capsys.readouterr()
    assert main(["undo", f"--run={finished}", "--edit=2", "--no-measure", *(["--exact"] if exact else [])]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert ("Later edits were made on a model that had these" in told) != exact
    one, other = (load_file(deltas_path(runs / name)) for name in ("x", "without"))
    off = max(float((one[name] - other[name]).norm() / other[name].norm()) for name in one)
    # Targets were fitted in other windows: float32 round-off.
    assert off < 1e-3 if exact else off > 1e-2


def test_an_undo_that_is_exact_by_itself_says_nothing(runs: Path, fit: Any, capsys: Any) -> None:
    assert fit("--run_name=base", "--model.editor.init_args.keys=base", "--data.limit=3") == 0
    capsys.readouterr()
    assert main(["undo", f"--run={runs / 'base'}", "--edit=1", "--no-measure"]) == 0
    assert "Later edits" not in capsys.readouterr().out


def test_a_process_that_dies_between_record_and_files(finished: Path, whole: Path, capsys: Any) -> None:
    with open_for_change(finished) as run:
        run.session.undo([2])
        expected = dict(run.stream.ledger.deltas)
    assert same_as(finished, whole) == ["records"]  # the files are of the state before
    assert main(["ask", f"--run={finished}", "Hello there", "--tokens=1"]) == 0
    assert "after 3 edits" in capsys.readouterr().out
    found = load_file(deltas_path(finished))
    assert all(torch.equal(found[name], delta) for name, delta in expected.items())
    assert held(finished) == [1, 3, 4]
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["edits"], summary["undone"]) == (3, 1)
    assert "stale" in summary
    before = contents(finished)
    assert main(["ask", f"--run={finished}", "Hello there", "--tokens=1"]) == 0
    assert contents(finished) == before  # once is enough


def test_an_unfinished_run_goes_on_behind_an_undo(killed: Path, fit: Any, whole: Path, capsys: Any) -> None:
    assert main(["undo", f"--run={killed}", "--edit=2"]) == 0
    assert "1 edit taken out, 2 in the model" in " ".join(capsys.readouterr().out.split())
    assert main(["ask", f"--run={killed}", "Hello there", "--tokens=1"]) == 0
    assert "after 2 edits" in capsys.readouterr().out
    assert fit("--run_name=x", "--resume=auto") == 0
    kinds = [record["kind"] for record in records_of(killed)]
    assert kinds == ["begin", "edit", "edit", "edit", "undo", "edit", "end"]
    assert held(killed) == [1, 3, 4]
    summary = json.loads((killed / "summary.json").read_text())
    assert (summary["edits"], summary["undone"], "stale" in summary) == (3, 1, False)
    metrics = left_by(killed)["metrics"]
    assert [row["step"] for row in metrics] == ["0", "1", "2", "3", "4"]
    assert metrics[:3] == left_by(whole)["metrics"][:3]
    with open_for_change(killed) as run:  # from the newest checkpoint, and from the journal alone
        expected = dict(run.stream.ledger.deltas)
    shutil.rmtree(killed / "checkpoints")
    with open_for_change(killed) as run:
        assert all(torch.equal(value, expected[name]) for name, value in run.stream.ledger.deltas.items())


def test_a_cut_run_is_a_run(
    killed: Path, fit: Any, whole: Path, tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """What it has made is asked, taken away, gone on from and undone; each says that it was not finished."""
    made = len(read_history(killed).made)
    assert 0 < made < EDITS
    assert not deltas_path(killed).is_file()
    told = f"was not finished: it has made {made} edits"
    out = tmp_path / "delta.safetensors"
    for args in (
        ["ask", f"--run={killed}", "Hello there", "--tokens=1", "--json"],
        ["log", f"--run={killed}"],
        ["export", f"--run={killed}", "--as=delta", f"--out={out}"],
        ["report", f"--run={killed}"],
    ):
        caplog.clear()
        assert main(args) == 0, args
        assert told in caplog.text or "not finished" in (killed / "report.html").read_text()
        assert (args[0] == "report") or told in caplog.text
    with safe_open(out, "pt") as file:
        assert len(json.loads(file.metadata()["edits"])) == made
    assert fit("--run_name=y", f"--continue={killed}", "--data.offset=4", "--data.limit=1") == 0
    assert len(read_history(killed.parent / "y").made) == made + 1
    assert fit("--run_name=x", "--resume=auto") == 0  # and none of this is in its way
    assert same_as(killed, whole) == []
    caplog.clear()
    assert main(["log", f"--run={killed}"]) == 0
    assert "not finished" not in caplog.text


def test_log_lists_the_ledger(finished: Path, capsys: Any) -> None:
    assert main(["undo", f"--run={finished}", "--edit=3", "--no-measure"]) == 0
    capsys.readouterr()
    before = contents(finished)
    assert main(["log", f"--run={finished}", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["number"], row["status"]) for row in rows] == [(1, "holds"), (2, "holds"), (3, "undone"), (4, "holds")]
    assert [(row["state"], row["holds"]) for row in rows[1:3]] == [("not measured", None), ("undone", False)]
    assert all(0 <= row["target_probability"] <= 1 for row in rows)
    assert main(["log", f"--run={finished}", "--json", "--last=2"]) == 0
    assert [row["number"] for row in json.loads(capsys.readouterr().out)] == [3, 4]
    assert main(["log", f"--run={finished}", f"--subject={subject_of(finished, 2).upper()}", "--json"]) == 0
    assert [row["number"] for row in json.loads(capsys.readouterr().out)] == [2]
    assert main(["log", f"--run={finished}"]) == 0
    told = capsys.readouterr().out
    assert "4 edits made, 3 in the model; whether they hold was not measured; 1 undone" in told
    assert "\n  3 undone: “" in told
    assert main(["log", f"--run={finished}", "--failed"]) == 0
    assert "undone: “" not in capsys.readouterr().out  # nobody says that it failed
    for args in (["--last=0"], ["--last=-1"]):
        with pytest.raises(SystemExit) as stop:
            main(["log", f"--run={finished}", *args])
        assert stop.value.code == 2
    assert contents(finished) == before


def test_log_tells_what_was_refused(runs: Path, fit: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check = EditLedger.check

    def refuse(ledger: EditLedger, updates: Any, entries: Any) -> Any:
        if len(ledger.history.handled) == 1 and entries:
            raise EditRefusedError("it would do harm [really]")
        return check(ledger, updates, entries)

    monkeypatch.setattr(EditLedger, "check", refuse)
    assert fit("--run_name=x", "--model.on_refused=skip", "--data.limit=3") == 0
    assert main(["log", f"--run={runs / 'x'}"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "it would do harm [really]" in told
    assert "2 edits made, 0 hold; 1 refused" in told
    assert "refused, builtin_facts.json:2: “The language spoken by most people in Mexico is” → “Polish”" in told
    assert json.loads((runs / "x" / "summary.json").read_text())["refused"] == 1


FACTS = """prompt,subject,target_new
The capital of Italy is,Italy,Vienna
The capital of Spain is,,Oslo
The capital of Italy is,Italy,Paris
The mother tongue of Ada is,Ada,Greek
The currency of Chad is,Chad,peso
"""


def test_what_is_left_out_is_written_down(
    runs: Path, fit: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A broken record, one like an earlier one, and a harmful one: with file, line and reason, wherever one looks."""
    check = EditLedger.check

    def refuse(ledger: EditLedger, updates: Any, entries: Any) -> Any:
        if any(entry.subject == "Ada" for entry in entries):
            raise EditRefusedError("it would do harm")
        return check(ledger, updates, entries)

    monkeypatch.setattr(EditLedger, "check", refuse)
    path = tmp_path / "facts.csv"
    path.write_text(FACTS)
    skips = ["--data.on_error=skip", "--model.on_refused=skip", "--model.on_conflict=refuse"]
    data = ["--data.source=file", f"--data.path={path}"]
    capsys.readouterr()
    assert fit("--run_name=x", *data, *skips, "--trainer.callbacks+=lit_edit.callbacks.ClosingTable") == 0
    closing = " ".join(capsys.readouterr().out.split())
    summary = json.loads((runs / "x" / "summary.json").read_text())
    found = [(row["kind"], row["file"], row["line"], row["target_new"]) for row in summary["left_out"]]
    file = str(path)
    assert found == [("broken", file, 3, ""), ("conflict", file, 4, "Paris"), ("refused", file, 5, "Greek")]
    assert all(row["reason"] for row in summary["left_out"])
    assert main(["report", f"--run={runs / 'x'}"]) == 0
    capsys.readouterr()
    assert main(["log", f"--run={runs / 'x'}"]) == 0
    log = " ".join(capsys.readouterr().out.split())
    page = (runs / "x" / "report.html").read_text()
    for row in summary["left_out"]:
        for told in (closing, log):
            assert f"{row['file']}:{row['line']}" in told
            assert row["reason"] in told
        assert f"{row['file']}:{row['line']}" in page
    assert "2 refused, 1 left out" in closing
    assert "1 broken record left out" in closing
    (runs / "x" / "summary.json").unlink()  # as of a run that was cut: the journal has them
    assert len([v for v in read_log(runs / "x").verdicts if v.place]) == 3


# ---- editing further -------------------------------------------------------------------------------------------------


def test_a_run_goes_on_from_the_edits_of_another(
    finished: Path, shared: Path, processes: Processes, runs: Path, fit: Any, tmp_path: Path, capsys: Any
) -> None:
    assert main(["undo", f"--run={finished}", "--edit=3", "--no-measure"]) == 0
    carried = load_file(deltas_path(finished))
    before = contents(finished)
    args = [f"--continue={finished}", "--data.offset=4", "--data.limit=3", "--data.batch_size=2"]
    assert fit("--run_name=y", *args) == 0
    assert contents(finished) == before
    history = read_history(runs / "y")
    ids = [entry.id for entry in history.made]
    old = [entry.id for entry in read_history(finished).made]
    assert ids[:4] == [f"x/{name}" for name in old]
    assert len(ids) == 7
    assert held(runs / "y") == [1, 2, 4, 5, 6, 7]
    summary = json.loads((runs / "y" / "summary.json").read_text())
    assert (summary["edits"], summary["undone"]) == (6, 1)
    # 0 is the model before any edit; the others have the numbers that log and undo know them by.
    assert [row["step"] for row in left_by(runs / "y")["metrics"]] == ["0", "6", "7"]
    assert list(read_run(runs / "y").rows) == [0, 6, 7]  # what the report draws

    # A run of that kind that is cut goes on as well, also from its journal alone.
    args = [*words(shared / "fast.yaml"), *args, "--runs_dir", str(runs), "--run_name=z", "--resume=auto"]
    assert processes.run(args, tmp_path, ("write", 5)) == -signal.SIGKILL
    assert processes.run(args, tmp_path, ("commit", 1)) == -signal.SIGKILL
    assert processes.run(args, tmp_path) == 0, (tmp_path / "child.log").read_text()
    assert same_as(runs / "z", runs / "y") == []

    capsys.readouterr()
    assert main(["undo", f"--run={runs / 'y'}", "--id=x/" + old[0], "--edit=5-7", "--exact"]) == 0
    assert held(runs / "y") == [2, 4]
    assert main(["export", f"--run={runs / 'y'}", f"--to={tmp_path / 'out'}"]) == 0
    assert "with 2 facts changed" in (tmp_path / "out" / "README.md").read_text()
    assert not all(torch.equal(carried[n], value) for n, value in load_file(deltas_path(runs / "y")).items())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.editor.init_args.covariance_weight=6"], "made with other settings (covariance_weight 5.0, now 6.0"),
        (["--continue=gone"], "there is no run folder"),
    ],
)
def test_editing_further_wants_the_same_editor(
    args: list[str], message: str, finished: Path, fit: Any, capsys: Any
) -> None:
    before = contents(finished)
    assert fit("--run_name=y", f"--continue={finished}", "--data.offset=4", *args) == 2
    assert message in capsys.readouterr().err
    assert contents(finished) == before


def facts_file(folder: Path, first: str = "Jane Doe") -> Path:
    path = folder / "facts.csv"
    path.write_text(
        f"prompt,subject,target_new\nThe chief of Acme is,Acme,{first}\nThe capital of Peru is,Peru,Oslo\n"
        "The capital of Chad is,Chad,Rome\n"
    )
    return path


def test_data_that_have_changed_behind_a_run_are_refused(
    tiny_folder: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Ids may stay the same (they are numbers of lines) while the facts change."""
    monkeypatch.chdir(tmp_path)
    args = ["fit", "--config", "quickstart", f"--model.language_model.name={tiny_folder}", *FAST]
    args += ["--data.source=facts", f"--data.path={facts_file(tmp_path)}", "--run_name=x", "--trainer.accelerator=cpu"]
    assert main([*args, "--trainer.max_steps=2"]) == 0
    facts_file(tmp_path, "Bob Smith")
    capsys.readouterr()
    assert main([*args, "--resume=auto"]) == 2
    told = capsys.readouterr().err
    assert "edit 'fact-1' was made with other data (target_new 'Jane Doe', now 'Bob Smith')" in told
    shutil.rmtree(tmp_path / "runs" / "x" / "checkpoints")  # from the journal alone it is seen as well
    assert main([*args, "--resume=auto"]) == 2
    assert "target_new 'Jane Doe', now 'Bob Smith'" in capsys.readouterr().err
    facts_file(tmp_path)
    assert main([*args, "--resume=auto"]) == 0


def test_continuing_never_deletes_what_it_continues(
    tiny_folder: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["fit", "--config", "quickstart", f"--model.language_model.name={tiny_folder}", *FAST, "--data.limit=2"]
    args += ["--trainer.accelerator=cpu"]
    assert main([*args, "--run_name=x"]) == 0
    left = sorted(str(path) for path in (tmp_path / "runs").rglob("*"))
    for source, told in (("runs/x", "a run cannot continue itself"), ("runs/typo", "there is no run folder")):
        assert main([*args, "--run_name=x", f"--continue={source}", "--overwrite=true"]) == 2
        assert told in capsys.readouterr().err
        assert sorted(str(path) for path in (tmp_path / "runs").rglob("*")) == left
    assert main([*args, "--run_name=y", "--trainer.max_steps=1"]) == 0
    assert main([*args, "--run_name=y", "--continue=runs/x", "--resume=auto"]) == 2
    assert "has begun already, with none" in capsys.readouterr().err


@pytest.fixture
def small_run(tiny_folder: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A finished run ``x`` of three edits, as the arguments that make it."""
    monkeypatch.chdir(tmp_path)
    args = ["fit", "--config", "quickstart", f"--model.language_model.name={tiny_folder}", *FAST, "--data.limit=3"]
    args += ["--trainer.accelerator=cpu", "--run_name=x"]
    assert main(args) == 0
    return args


def test_lost_deltas_are_made_from_the_journal(small_run: list[str]) -> None:
    run = Path("runs/x")
    before = load_file(deltas_path(run))
    deltas_path(run).unlink()
    assert main(["ask", "--run", "runs/x", "The capital of Italy is", "--tokens", "2"]) == 0
    after = load_file(deltas_path(run))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_undo_keeps_what_was_measured_before(small_run: list[str]) -> None:
    shutil.rmtree("runs/x/checkpoints")
    path = Path("runs/x/ledger/edits.jsonl")
    before = [json.loads(row) for row in path.read_text().splitlines()]
    assert main(["undo", "--run", "runs/x", "--edit", "2", "--no-measure"]) == 0
    after = [json.loads(row) for row in path.read_text().splitlines()]
    for old, new in zip(before, after, strict=True):
        assert {k: v for k, v in old.items() if k.startswith("immediate_")} == {
            k: v for k, v in new.items() if k.startswith("immediate_")
        }
    assert "immediate_accuracy" in after[0]


def test_a_checkpoint_behind_its_run_is_measured_with_a_warning(
    small_run: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["undo", "--run", "runs/x", "--edit", "2", "--no-measure"]) == 0
    measure = ["validate", *small_run[1:-1], "--ckpt_path=runs/x/checkpoints/last.ckpt"]
    assert main(measure) == 0
    assert "is behind its run by 1 changes" in caplog.text


def test_an_undo_behind_damage_is_told_to_be_lost(small_run: list[str], caplog: pytest.LogCaptureFixture) -> None:
    assert main(["undo", "--run", "runs/x", "--last", "2", "--no-measure"]) == 0
    path = journal_path(Path("runs/x"))
    second = Journal(path)._places[2].offset
    data = bytearray(path.read_bytes())
    data[second + 2000] ^= 1
    path.write_bytes(data)
    assert main([*small_run, "--resume=auto"]) == 0
    assert "undo of edit 2, 3 will NOT: repeat it by hand" in caplog.text
    assert len(read_history(Path("runs/x")).live) == 3
