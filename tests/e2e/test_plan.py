"""A plan against a run: the memory that is planned for the real model is the memory that the run takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lit_edit.cli.main import main

pytestmark = pytest.mark.model

RUN = ["--config", "quickstart", "--data.limit=16", "--trainer.accelerator=cpu"]


# What the system tells of an ended process is at least what its parent had when it started it: it tells itself.
MEASURED = """
import re, sys
from pathlib import Path
from lit_edit.cli.main import main
status = main(sys.argv[2:])
Path(sys.argv[1]).write_text(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
sys.exit(status)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell a process its peak memory")
def test_the_planned_memory_is_what_a_run_takes(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert main(["plan", *RUN, "--json", str(file)]) == 0
    plan = json.loads(file.read_text())
    assert plan["workload"]["counted"]

    command = [sys.executable, "-c", MEASURED, str(tmp_path / "peak"), "fit", *RUN]
    command += ["--run_name=x", f"--runs_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak = int((tmp_path / "peak").read_text()) * 1024
    assert plan["bytes"]["device"]["first"] == pytest.approx(peak, rel=0.15)

    seconds = json.loads((tmp_path / "x" / "summary.json").read_text())["seconds"]["per_edit"]
    assert 0.2 < plan["seconds_per_edit"] / seconds < 5  # other programs may be running
