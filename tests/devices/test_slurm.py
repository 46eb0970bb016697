"""The batch scripts under a real SLURM: controller, node and sbatch on the loopback address of this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

from .conftest import SETTINGS, several
from .one_node import cluster, missing, said, until
from .test_fit import assert_same_run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing() or "SLURM is here")]

TOLD = '''
import os, subprocess, time
from lightning.pytorch import Callback

class TimeIsUp(Callback):
    """Lets SLURM tell all processes of the job, as it does before the time is up; in the first attempt only."""
    def __init__(self, edit: int):
        self.edit = edit
    def on_train_batch_end(self, trainer, stream, *args):
        if stream.edits_made == self.edit and "SLURM_RESTART_COUNT" not in os.environ:
            if trainer.is_global_zero:
                subprocess.run(["scancel", "--signal=USR1", os.environ["SLURM_JOB_ID"]], check=True)
            time.sleep(3)  # the edit takes a while yet
'''


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory, environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """The environment of commands in a cluster of this machine."""
    with cluster(tmp_path_factory.mktemp("cluster")) as ours:
        yield {**environment, **ours, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def state_of(job: str, environment: Mapping[str, str]) -> str:
    found = re.search(r"JobState=(\w+)", said(["scontrol", "show", "job", job], environment))
    return found[1] if found else "gone"


def test_a_job_is_told_that_its_time_is_up_queued_again_and_goes_on(
    slurm: dict[str, str], single: Path, place: Path, tiny_folder: Path
) -> None:
    (place / "told.py").write_text(TOLD)
    script = place / "slurm.sbatch"
    shutil.copy(ROOT / "configs" / "cluster" / "slurm.sbatch", script)
    sizes = ["--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", "--mem=0", "--time=10"]
    ours = [f"--model.language_model.name={tiny_folder}", *SETTINGS, several("ddp")[0]]
    told = ["--trainer.callbacks+=told.TimeIsUp", "--trainer.callbacks.edit=2"]
    command = [
        "sbatch",
        "--parsable",
        f"--chdir={place}",
        "--job-name=real",
        *sizes,
        str(script),
        "quickstart",
        *ours,
        *told,
    ]
    job = said(command, slurm).strip().splitlines()[-1]
    assert job.isdecimal(), job
    log = place / f"real-{job}.out"

    def words() -> str:
        return log.read_text(errors="replace") if log.is_file() else ""

    until(
        lambda: "Requeued" in said(["scontrol", "show", "job", job], slurm) or "stopped behind" in words(),
        words(),
        place,
        120,
    )
    until(lambda: state_of(job, slurm) == "PENDING", "not queued again", place, 60)
    assert "stopped behind edit 2 by SIGUSR1" in words()
    assert (place / "runs" / "real" / "checkpoints" / "stopped-2.ckpt").is_file()
    said(["scontrol", "update", f"JobId={job}", "StartTime=now"], slurm)  # SLURM lets a job rest before it begins again
    until(lambda: state_of(job, slurm) == "COMPLETED", words(), place, 150)
    assert "Restarts=1" in said(["scontrol", "show", "job", job], slurm)
    assert_same_run(place / "runs" / "real", single)


def test_an_array_runs_the_points_of_a_sweep(slurm: dict[str, str], place: Path, tiny_folder: Path) -> None:
    settings = dict(word.removeprefix("--").split("=") for word in [*SETTINGS, "--data.limit=2"])
    grid = {
        "name": "array",
        "base": ["quickstart"],
        "settings": settings | {"model.language_model.name": str(tiny_folder)},
        "grid": {"editor": {"d4s": {"config": "method/d4s"}, "memit": {"config": "method/memit"}}},
    }
    (place / "array.yaml").write_text(yaml.safe_dump(grid))
    sweep = [sys.executable, "-m", "lit_edit", "sweep", "--config", "array.yaml"]
    written = subprocess.run(
        [*sweep, "--array", "slurm"], cwd=place, env=slurm, capture_output=True, text=True, check=False
    )
    assert written.returncode == 0, written.stderr
    folder = place / "runs" / "sweeps" / "array"
    job = said(["sbatch", "--parsable", "--cpus-per-task=1", str(folder / "sweep.sbatch")], slurm).strip()
    assert job.isdecimal(), job
    until(lambda: not said(["squeue", "-h", "-j", job], slurm).strip(), "the array does not end", place, 200)
    gathered = subprocess.run([*sweep, "--gather"], cwd=place, env=slurm, capture_output=True, text=True, check=False)
    logs = "\n".join(log.read_text(errors="replace") for log in folder.glob("slurm-*.out"))
    assert gathered.returncode == 0, gathered.stderr + logs
    points = json.loads((folder / "table.json").read_text())["points"]
    assert [(row["editor"], row["state"], row["edits"]) for row in points] == [
        ("d4s", "done", 2),
        ("memit", "done", 2),
    ], logs
