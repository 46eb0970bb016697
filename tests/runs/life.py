"""What tests of runs share: a config, processes of their own that can be killed, and what a run leaves behind."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lit_edit.cli.main import main
from lit_edit.ledger.journal import Journal
from lit_edit.runs.files import deltas_path, journal_path
from lit_edit.runs.folder import read_history
from lit_edit.stream.edit_stream import EditStream

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


def words(config: Path, *args: str) -> list[str]:
    return ["fit", "--config", str(config), *args]


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


def resume(processes: Processes, shared: Path, folder: Path, die: tuple[str, int] | None = None) -> int:
    return processes.run(words(shared / "fast.yaml", "--run_name=x", "--resume=auto"), folder, die)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def records_of(folder: Path) -> list[Any]:
    try:
        return Journal(journal_path(folder), writable=False).records
    except ValueError:
        return []


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ledger" / "edits.jsonl").read_text().splitlines()]


def held(folder: Path) -> list[int]:
    live = [entry.number for entry in read_history(folder).live]
    assert [row["number"] for row in rows_of(folder) if row["status"] == "holds"] == live
    return live
