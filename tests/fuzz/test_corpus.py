"""Every broken input ends in an error that says where and what, and leaves nothing behind."""

from __future__ import annotations

import hashlib
import logging
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from lit_edit.cli.main import main
from lit_edit.data.request import DataError
from lit_edit.data.sources import load_requests
from tests.fuzz.corpus import BrokenConfig, BrokenFile, broken_configs, broken_files

FILES = broken_files()
CONFIGS = broken_configs()
SECONDS = 30
"""No input may take longer; a hundred times what they take on a quiet machine."""
LONGEST = 700
"""Letters of an error, paths left aside: nobody reads more."""

SHARE = 3
"""One case in so many is run every time; the others with ``pytest -m slow``."""


def sampled(cases: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrise over all cases, most of them slow."""
    marks = [() if number % SHARE == 0 else (pytest.mark.slow,) for number in range(len(cases))]
    return pytest.mark.parametrize(
        "case", [pytest.param(case, id=case.name, marks=mark) for case, mark in zip(cases, marks, strict=True)]
    )


each_file = sampled(FILES)


@contextmanager
def time_limit() -> Iterator[None]:
    """Fail rather than hang."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"still at work after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def digest(folder: Path) -> str:
    """One hash of all files of a folder."""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return whole.hexdigest()


@pytest.fixture
def own_folder(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, beside that of the broken files."""
    (tmp_path / "here").mkdir()
    (tmp_path / "given").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def test_there_are_at_least_500_and_no_two_of_one_name() -> None:
    assert len(FILES) >= 380
    assert len(CONFIGS) >= 120
    names = [case.name for case in (*FILES, *CONFIGS)]
    assert len(set(names)) == len(names) >= 500


def test_the_corpus_is_the_same_every_time() -> None:
    again = broken_files.__wrapped__()
    assert [(case.name, case.content) for case in again] == [(case.name, case.content) for case in FILES]


# ---- data files through the readers ----------------------------------------------------------------------------------


@each_file
def test_a_broken_file_ends_in_a_data_error_that_names_the_place(case: BrokenFile, tmp_path: Path) -> None:
    path = case.write(tmp_path)
    with time_limit(), pytest.raises(DataError) as caught:
        load_requests(case.source, path)  # type: ignore[arg-type]
    error = str(caught.value)
    assert case.what in error
    assert "\n" not in error
    if path and len(path) < 200 and path.isprintable():
        assert error.startswith(f"{path}:{case.line}: " if case.line else f"{path}:")
    assert len(error.replace(path, "")) < LONGEST


@sampled([case for case in FILES if case.good is not None])
def test_a_broken_record_is_left_out_when_asked_and_no_other(case: BrokenFile, tmp_path: Path) -> None:
    logging.getLogger("lit_edit").setLevel(logging.ERROR)
    path = case.write(tmp_path)
    requests, skipped = load_requests(case.source, path, on_error="skip")  # type: ignore[arg-type]
    assert (len(requests), len(skipped)) == (case.good, 1)
    assert skipped[0][0] == f"{path}:{case.line}"
    assert case.what in skipped[0][1]


# ---- through the command line ----------------------------------------------------------------------------------------


def refused(args: list[str], folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command line that cannot succeed; return its error, and check that nothing else came of it."""
    before = digest(model)
    with time_limit():
        try:
            status = main(args)
        except SystemExit as stop:  # jsonargparse
            status = stop.code
    err = capsys.readouterr().err
    assert status == 2, err[-2000:]
    assert "Traceback" not in err
    assert err.count("error: ") == 1 or err.count("lit-edit: error: ") == 1
    assert digest(model) == before
    left = [path for path in (folder / "here").rglob("*") if path != folder / "here" / "runs"]
    assert left == []
    return err.partition("error: ")[2].strip()


def runnable(model: Path, limit: int = 2) -> list[str]:
    """Arguments with which the tiny model can be edited."""
    return [
        "--config",
        "quickstart",
        f"--model.language_model.name={model}",
        "--model.editor.init_args.layers=[1,2]",
        "--model.editor.init_args.target.steps=2",
        "--model.editor.init_args.contexts=plain",
        "--model.statistics.tokens=0",
        "--trainer.accelerator=cpu",
        f"--data.limit={limit}",
    ]


@pytest.mark.parametrize("case", FILES[::13], ids=lambda case: case.name)
def test_the_command_line_refuses_broken_files(
    case: BrokenFile, own_folder: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = case.write(own_folder / "given")
    args = ["fit", *runnable(tiny_folder, limit=9), f"--data.source={case.source}", f"--data.path={path}"]
    error = refused(args, own_folder, tiny_folder, capsys)
    assert case.what in error
    assert len(path) > 200 or (f"{path}:{case.line}: " if case.line else path) in error


@sampled(CONFIGS)
def test_the_command_line_refuses_broken_configs(
    case: BrokenConfig, own_folder: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = case.write(own_folder / "given", tiny_folder)
    error = refused([case.command, *runnable(tiny_folder), *args], own_folder, tiny_folder, capsys)
    assert case.what in error
    assert len(error.replace(str(own_folder), "")) < 2 * LONGEST


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_the_working_command_line_works(
    command: str, own_folder: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else the tests above would prove nothing."""
    assert main([command, *runnable(tiny_folder)]) == 0
