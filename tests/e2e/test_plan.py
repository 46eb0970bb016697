"""A plan against a run: the memory that is planned for the real model is the memory that the run takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_edit.cli import main

pytestmark = pytest.mark.model

RUN = ["--config", "quickstart", "--data.limit=16", "--trainer.accelerator=cpu"]


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="this system does not tell the peak memory of a process")
def test_the_planned_memory_is_what_a_run_takes(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert main(["plan", *RUN, "--json", str(file)]) == 0
    plan = json.loads(file.read_text())
    assert plan["workload"]["counted"]

    command = [sys.executable, "-m", "lit_edit", "fit", *RUN, "--run_name=x", f"--runs_dir={tmp_path}"]
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    _, status, usage = os.wait4(process.pid, 0)  # of this process alone
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, (tmp_path / "output").read_text()
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert plan["bytes"]["device"]["first"] == pytest.approx(peak, rel=0.15)

    seconds = json.loads((tmp_path / "x" / "summary.json").read_text())["seconds"]["per_edit"]
    assert 0.2 < plan["seconds_per_edit"] / seconds < 5  # other programs may be running
