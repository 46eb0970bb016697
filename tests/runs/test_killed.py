"""Processes that are killed, at any write and at any time: nothing that counted is lost.

A run is killed by processes of its own, forked from one that has imported everything: a kill costs a second.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, safe_open

from lit_edit.cli.main import main
from lit_edit.ledger.edit_ledger import weights_state
from lit_edit.ledger.journal import Journal
from lit_edit.runs.files import deltas_path, journal_path
from lit_edit.runs.folder import read_history
from tests.runs.life import Processes, resume, same_as, words


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
