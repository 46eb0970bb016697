"""Runs of the command line on several processes, with a tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

SETTINGS = [
    "--model.editor.init_args.layers=[1,2]",
    "--model.editor.init_args.target.steps=6",
    "--model.statistics.tokens=0",
    "--trainer.accelerator=cpu",
    "--data.limit=6",
]
SECONDS = 150  # ranks that wait for each other wait for ever

HELPERS = '''
import os, signal
from lightning.pytorch import Callback

class At(Callback):
    """Sends a signal to one of the ranks behind an edit."""
    def __init__(self, edit: int, rank: int, number: int):
        self.edit, self.rank, self.number = edit, rank, number
    def on_train_batch_end(self, trainer, stream, *args):
        if stream.edits_made == self.edit and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)

class Export(Callback):
    """Exports the edited model, on every rank."""
    def __init__(self, folder: str):
        self.folder = folder
    def on_fit_end(self, trainer, stream):
        stream.export(self.folder)
'''


def at(edit: int, rank: int, number: int) -> list[str]:
    """Return options that send a signal to a rank behind an edit."""
    options = {"edit": edit, "rank": rank, "number": int(number)}
    values = [f"--trainer.callbacks.{name}={value}" for name, value in options.items()]
    return ["--trainer.callbacks+=rank_helpers.At", *values]


Fit = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the runs of a module."""
    folder = tmp_path_factory.mktemp("devices")
    (folder / "rank_helpers.py").write_text(HELPERS)
    return folder


@pytest.fixture(scope="module")
def environment(place: Path) -> dict[str, str]:
    """What processes of their own are started with."""
    ours = {
        "LIT_EDIT_CACHE": str(place / "cache"),
        "PYTHONPATH": str(place),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
    }
    return {**os.environ, **ours}


@pytest.fixture(scope="module")
def fit(place: Path, tiny_folder: Path, environment: Mapping[str, str]) -> Fit:
    """Run ``lit-edit fit`` in a process of its own; ``start`` puts another program in front."""

    def run(
        *args: str, start: list[str] | None = None, config: str = "quickstart", **options: Any
    ) -> subprocess.CompletedProcess[str]:
        base = ["fit", "--config", config, f"--model.language_model.name={tiny_folder}"]
        command = [*(start or [sys.executable]), "-m", "lit_edit", *base, *SETTINGS, *args]
        settings = {"cwd": place, "env": environment, "timeout": SECONDS, "capture_output": True, "text": True}
        return subprocess.run(command, check=False, **{**settings, **options})

    return run


def several(strategy: str, devices: int = 2) -> list[str]:
    """Return options for several processes."""
    return [f"--trainer.strategy={strategy}", f"--trainer.devices={devices}"]


@pytest.fixture(scope="module")
def single(fit: Fit, place: Path) -> Path:
    """The stream on one process, to compare with."""
    done = fit("--run_name=single")
    assert done.returncode == 0, done.stderr
    return place / "runs" / "single"
