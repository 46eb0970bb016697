"""A run that came to its end, and one that was killed; each test has a copy of its own."""

from __future__ import annotations

import logging
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lit_edit.cli.main import main
from tests.runs.life import CONFIG, Processes, words


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Runs of this process and of others are compared bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, and a cache that fills up."""
    folder = tmp_path_factory.mktemp("bad_days")
    (folder / "fast.yaml").write_text(CONFIG.format(model=tiny_folder))
    return folder


@pytest.fixture
def runs(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the runs of a test are; the process is in the folder above."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIT_EDIT_CACHE", str(shared / "cache"))
    monkeypatch.setattr(logging.root, "handlers", list(logging.root.handlers))
    return tmp_path / "runs"


@pytest.fixture
def fit(shared: Path, runs: Path) -> Callable[..., int]:
    """Run ``lit-edit fit`` in this process."""

    def run(*args: str, config: Path | None = None) -> int:
        try:
            return main(words(config or shared / "fast.yaml", *args))
        except SystemExit as stop:
            return int(stop.code or 0)

    return run


@pytest.fixture(scope="session")
def processes(shared: Path) -> Iterator[Processes]:
    started = Processes(shared / "cache")
    yield started
    started.end()


@pytest.fixture(scope="session")
def whole(shared: Path, processes: Processes) -> Path:
    """A run that was never interrupted. Not to be changed."""
    folder = shared / "whole"
    folder.mkdir()
    assert processes.run(words(shared / "fast.yaml", "--run_name=x"), folder) == 0, (folder / "child.log").read_text()
    return folder / "runs" / "x"


@pytest.fixture(scope="session")
def killed_once(shared: Path, processes: Processes) -> Path:
    """A run that was killed behind its third commit, before anything else was said of it. Not to be changed."""
    folder = shared / "killed"
    folder.mkdir()
    die = ("commit", 3)
    assert processes.run(words(shared / "fast.yaml", "--run_name=x"), folder, die) == -signal.SIGKILL
    return folder / "runs" / "x"


@pytest.fixture
def finished(whole: Path, runs: Path) -> Path:
    """A finished run, to do anything with."""
    return Path(shutil.copytree(whole, runs / "x", symlinks=True))


@pytest.fixture
def killed(killed_once: Path, runs: Path) -> Path:
    """A run that was killed, to do anything with."""
    return Path(shutil.copytree(killed_once, runs / "x", symlinks=True))
