"""When a rank fails while the leader is busy, the leader ends with a word."""

from __future__ import annotations

import subprocess
import sys

import pytest

BUSY = """
import subprocess, sys, time
from lit_edit.console.launching import watch
other = subprocess.Popen([sys.executable, "-c", "import sys; sys.exit({status})"])
watch([other], "lit-edit fit --resume auto", grace={grace}, every=0.05)
time.sleep({busy})
print("done", flush=True)
"""


def lead(status: int, grace: float, busy: float) -> subprocess.CompletedProcess[str]:
    code = BUSY.format(status=status, grace=grace, busy=busy)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_a_busy_leader_is_ended_with_the_name_of_the_rank() -> None:
    done = lead(status=3, grace=0.2, busy=50)
    assert done.returncode == 1
    assert "lit-edit: error: rank 1 (process " in done.stderr
    assert "lit-edit fit --resume auto" in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
def test_a_leader_that_ends_by_itself_is_left_alone() -> None:
    done = lead(status=3, grace=30, busy=1)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.slow
def test_ranks_that_have_ended_well_are_no_reason() -> None:
    done = lead(status=0, grace=0, busy=1)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
