"""Twelve real edits on one process, on two with a model each, and on two with half of every layer each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytestmark = [pytest.mark.model, pytest.mark.slow]


def fit(place: Path, name: str, *args: str) -> Path:
    command = [sys.executable, "-m", "lit_edit", "fit", "--config", "quickstart", f"--run_name={name}"]
    done = subprocess.run(
        [*command, "--data.limit=12", "--trainer.accelerator=cpu", *args],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return place / "runs" / name


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(tmp_path_factory.mktemp("devices"), "single")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_make_the_edits_of_one(strategy: str, single: Path) -> None:
    # That the ranks hold the same bits is checked by the run itself: ReplicaCheck stops it otherwise.
    run = fit(single.parents[1], strategy, f"--trainer.strategy={strategy}", "--trainer.devices=2")
    ours, theirs = (load_file(r / "ledger" / "deltas.safetensors") for r in (run, single))
    for name, delta in theirs.items():
        assert float((ours[name] - delta).norm() / delta.norm()) < 1e-4
    from lit_edit.runs.folder import open_run

    for one, other in zip(open_run(run).ledger.adapter.model.parameters(),
                          open_run(single).ledger.adapter.model.parameters(), strict=True):  # fmt: skip
        assert float((one - other).norm() / other.norm()) < 1e-5
    found, wanted = (json.loads((r / "summary.json").read_text()) for r in (run, single))
    assert found["edits"] == wanted["edits"] == 12
    for kind in ("efficacy", "generalization", "locality"):
        assert found["final"][kind] == pytest.approx(wanted["final"][kind], rel=1e-3)
    assert found["final"]["perplexity"] == pytest.approx(wanted["final"]["perplexity"], rel=1e-4)
