"""Two processes at one run, Ctrl-C, and a cut in the middle of a step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from lit_edit.callbacks import LayerNorms, RunFolder

from lit_edit.cli.main import main
from lit_edit.editors.closed_form.engine import ClosedFormEditor
from lit_edit.files.trees import load_tree
from lit_edit.runs.files import run_lock
from lit_edit.stream.edit_stream import EditStream
from tests.runs.life import EDITS, Processes, contents, records_of, resume, same_as, words


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


def wait_for(happened: Callable[[], bool], seconds: float = 30) -> None:
    end = time.time() + seconds
    while not happened():
        assert time.time() < end, "it did not happen"
        time.sleep(0.02)


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
