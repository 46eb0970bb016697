"""What studies do alike: where they write, settings from the command line, what is left to run, and how to go on."""

from __future__ import annotations

import argparse
import logging
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_edit.errors import ArgumentError
from lit_edit.files.paths import expand
from lit_edit.runs.files import run_lock
from lit_edit.sweeps.grids import Grid


def begin_study() -> None:
    """Say what goes wrong where tables are not mixed up with it."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)


def folder_of(runs_dir: str, name: str) -> Path:
    """Return where a study keeps its runs and tables."""
    return expand(runs_dir).resolve() / "studies" / name


@contextmanager
def results_folder(out: Path | None, kind: str, name: str) -> Iterator[Path]:
    """Hold the folder of results that come one by one: ``--out``, else ``runs/KIND/NAME``; nobody else may be in it."""
    folder = out or Path("runs") / kind / re.sub(r"[^\w.-]+", "-", name).strip("-.")
    folder.mkdir(parents=True, exist_ok=True)
    with run_lock(folder, "--out"):
        yield folder


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of every run that ``--data``, ``--edits`` and ``--model`` make."""
    names = {"data": "data.path", "edits": "data.limit", "model": "model.language_model.name"}
    told = {setting: getattr(options, name, None) for name, setting in names.items()}
    return {name: str(v.resolve()) if isinstance(v, Path) else v for name, v in told.items() if v is not None}


def check_files(**files: Path | None) -> None:
    """Raise :class:`ArgumentError` for the first of some options that names a file which is not there."""
    for name, path in files.items():
        if path is not None and not path.is_file():
            raise ArgumentError(f"--{name} {path}: no such file")


def check_data(options: argparse.Namespace) -> None:
    """Raise :class:`ArgumentError` if runs are wanted and ``--data`` is not given, or not there."""
    if options.data is None and not options.gather:
        raise ArgumentError("--data is missing: a CounterFact file with as many edits as a run makes")
    check_files(data=options.data)


def run_rest(
    grid: Grid,
    folder: Path,
    options: argparse.Namespace,
    what: str = "study",
    prepare: Callable[[Mapping[str, Any]], None] | None = None,
    proof: str | None = None,
) -> int | None:
    """Run what is left of a grid; or list it, with ``--dry-run``; or see that there is something, with ``--gather``.

    Args:
        grid: The runs.
        folder: Their folder.
        options: Of the command.
        what: Is run, for messages.
        prepare: Does what comes before the first run; receives the settings of all by name.
        proof: A file of the folder that is there if anything is; by default one of the runs.

    Returns:
        The exit status of :func:`~lit_edit.sweeps.points.run_points`; ``None`` after a listing.
    """
    if options.gather:
        if not any((folder / name).exists() for name in ([proof] if proof else [p.name for p in grid.points])):
            raise ArgumentError(f"nothing of this {what} is done yet in {folder}; leave --gather out")
        return 0

    from lit_edit.sweeps.points import run_or_list

    return run_or_list(grid, folder, options.dry_run, prepare=prepare)


def as_cell(value: float | str | None, form: str = ".3f") -> str:
    """Return a cell of a table: a dash for what is not known; words and whole numbers as they are."""
    if value is None:
        return "–"
    return str(value) if isinstance(value, (str, int)) else format(value, form)


def say(text: str) -> None:
    """Write a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def say_report(text: str, folder: Path, *names: str) -> None:
    """Show tables, and say in which files (all endings of these names) they are."""
    files = sorted(path.name for name in names for path in folder.glob(f"{name}.*"))
    sys.stdout.write(f"\n{text}\nEverything is in {folder}/ ({', '.join(files)})\n")


def say_how_to_go_on(study: str, args: Sequence[str], why: str = "interrupted; go on with") -> None:
    """Say with which command a study that was cut goes on."""
    sys.stderr.write(f"\nlit-edit: {why}\n  {shlex.join(['lit-edit', 'study', study, *args])}\n")


def end_study(study: str, args: Sequence[str], status: int, text: str, folder: Path, name: str) -> int:
    """Show what a study has come to, and how it goes on if a signal has cut it; return its exit status."""
    say_report(text, folder, name)
    if status > 128:
        say_how_to_go_on(study, args)
    return status
