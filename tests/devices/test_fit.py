"""A stream on several processes is the stream on one: the same weights, summary, files; also when it is cut."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lit_edit.ledger.journal import Journal
from lit_edit.runs.files import journal_path

from .conftest import SECONDS, SETTINGS, Fit, at, several


def distance(one: Path, other: Path) -> float:
    """Return by how much the updates of two runs differ, relative to their norms, at most."""
    a, b = (load_file(run / "ledger" / "deltas.safetensors") for run in (one, other))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).norm() / a[name].norm()) for name in a)


def assert_same_run(run: Path, single: Path) -> None:
    """Compare all that a run leaves behind."""
    assert distance(single, run) < 1e-5
    found, wanted = (json.loads((r / "summary.json").read_text()) for r in (run, single))
    _compare(found, wanted)
    found, wanted = ([_kinds(record) for record in Journal(journal_path(r)).records] for r in (run, single))
    assert found == wanted
    rows = (run / "metrics.csv").read_text().splitlines()
    assert len(rows) == len((single / "metrics.csv").read_text().splitlines())  # nothing is logged twice
    assert (run / "figures" / "metrics.png").is_file()


def _kinds(record: Mapping[str, Any]) -> Any:
    return record["kind"], [entry["id"] for entry in record.get("entries", ())]


def _compare(found: Any, wanted: Any, name: str = "") -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            if key != "seconds":
                _compare(found[key], wanted[key], f"{name}/{key}")
    elif wanted is None:
        assert found is None, name
    else:
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize(
    ("strategy", "devices"), [("ddp", 2), ("fsdp2", 2), pytest.param("ddp", 4, marks=pytest.mark.slow)]
)
def test_many_ranks_make_the_same_edits(strategy: str, devices: int, fit: Fit, single: Path, place: Path) -> None:
    name = f"{strategy}{devices}"
    export = ["--trainer.callbacks+=rank_helpers.Export", f"--trainer.callbacks.folder={place / f'exported-{name}'}"]
    wandb = "--trainer.logger+=lit_edit.loggers.RunWandbLogger"
    done = fit(*several(strategy, devices), f"--run_name={name}", *export, wandb)
    assert done.returncode == 0, done.stderr
    assert_same_run(single.parent / name, single)
    assert done.stdout.count("Everything is in") == 1  # one rank speaks for all
    assert done.stdout.count("mean |W| of the edited layers") == 1
    assert len(list((place / "runs" / name / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp2", "fsdp2"])
def test_what_ranks_have_exported_is_what_their_run_exports(
    name: str, place: Path, environment: Mapping[str, str]
) -> None:
    name = {"fsdp2": "fsdp22"}.get(name, name)
    tool = {"cwd": place, "env": environment, "check": True, "capture_output": True}
    lit_edit = [sys.executable, "-m", "lit_edit"]
    subprocess.run([*lit_edit, "export", "--run", f"runs/{name}", "--to", f"again-{name}"], **tool)
    ours, theirs = (load_file(place / f"{word}-{name}" / "model.safetensors") for word in ("exported", "again"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    subprocess.run([*lit_edit, "undo", "--run", f"runs/{name}", "--edit", "1-6"], **tool)
    left = load_file(place / "runs" / name / "ledger" / "deltas.safetensors")
    assert max(float(delta.abs().max()) for delta in left.values()) < 1e-12


def dies(done: subprocess.CompletedProcess[str]) -> None:
    """Check that a run ended by the death of rank 1 says so, and how to go on."""
    assert done.returncode == 1
    assert re.search(r"lit-edit: error: rank 0 stops .*: rank 1 \(process \d+ on .*\) has ended", done.stderr)
    assert "--resume auto" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_run_goes_on_on_any_number_of_processes(fit: Fit, single: Path, place: Path) -> None:
    run = ["--run_name=changing", "--resume=auto"]
    dies(fit(*several("ddp"), *run, *at(2, 1, signal.SIGKILL)))
    assert fit(*run, *at(4, 0, signal.SIGKILL)).returncode == -signal.SIGKILL
    done = fit(*several("fsdp2"), *run)
    assert done.returncode == 0, done.stderr
    assert_same_run(place / "runs" / "changing", single)


@pytest.mark.slow
def test_a_run_in_parts_goes_on_with_whole_models(fit: Fit, single: Path, place: Path) -> None:
    run = ["--run_name=parts", "--resume=auto"]
    dies(fit(*several("fsdp2"), *run, *at(3, 1, signal.SIGKILL)))
    done = fit(*several("ddp"), *run)
    assert done.returncode == 0, done.stderr
    assert_same_run(place / "runs" / "parts", single)


@pytest.mark.slow
def test_torchrun(fit: Fit, single: Path, place: Path) -> None:
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    run = ["--run_name=torchrun", "--resume=auto", *several("ddp")]
    done = fit(*run, start=start)
    assert done.returncode == 0, done.stderr
    assert_same_run(place / "runs" / "torchrun", single)
    again = fit(*run, start=start)  # it has ended: all ranks are told
    assert again.returncode == 0, again.stderr
    assert "has come to its end already" in again.stdout


@pytest.mark.slow
def test_a_slurm_job_is_stopped_between_two_edits_queued_again_and_goes_on(
    fit: Fit, single: Path, place: Path, tiny_folder: Path, environment: Mapping[str, str]
) -> None:
    called, program = place / "scontrol.txt", place / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {called}\n')
    program.chmod(0o755)
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "edits",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "MASTER_ADDR": "127.0.0.1",
        "PATH": f"{program.parent}:{os.environ['PATH']}",
    }
    args = [f"--model.language_model.name={tiny_folder}", *SETTINGS, *several("ddp"), "--resume=auto"]

    def srun(*more: str) -> list[tuple[int, str]]:
        command = [sys.executable, "-m", "lit_edit", "fit", "--config", "quickstart", *args, *more]
        tasks = [
            subprocess.Popen(
                command,
                cwd=place,
                env={**environment, **job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            return [(task.wait(), said) for task in tasks for said in [task.communicate(timeout=SECONDS)[0]]]
        finally:
            for task in tasks:
                task.kill()

    stopped = srun(*at(2, 1, signal.SIGUSR1))
    assert [status for status, _ in stopped] == [0, 0], stopped
    assert "stopped behind edit 2 by SIGUSR1" in stopped[0][1]
    assert called.read_text() == "requeue 4711\n"
    run = place / "runs" / "job-4711"  # the job's own name, which the job started again knows too
    assert (run / "checkpoints" / "stopped-2.ckpt").is_file()
    done = srun()
    assert [status for status, _ in done] == [0, 0], done
    assert_same_run(run, single)
