"""What studies of many runs do alike: settings from the command line, what is left to run, and how to go on."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_edit.errors import ArgumentError
from lit_edit.sweeps.grids import Grid, Point


def begin_study() -> None:
    """Say what goes wrong where tables are not mixed up with it."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)


def folder_of(runs_dir: str, name: str) -> Path:
    """Return where a study keeps its runs and tables."""
    return Path(runs_dir).expanduser().resolve() / "studies" / name


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of every run that ``--data``, ``--edits`` and ``--model`` make."""
    told = {name: getattr(options, name, None) for name in ("data", "edits", "model")}
    names = {"data": "data.path", "edits": "data.limit", "model": "model.language_model.name"}
    return {
        names[name]: str(value.resolve()) if isinstance(value, Path) else value
        for name, value in told.items()
        if value is not None
    }


def check_there(grid: Grid, folder: Path, what: str = "study") -> None:
    """Refuse to gather nothing: :class:`ArgumentError` if none of the runs was begun."""
    if not any((folder / point.name).is_dir() for point in grid.points):
        raise ArgumentError(f"nothing of this {what} is done yet in {folder}; leave --gather out")


def run_rest(
    grid: Grid,
    folder: Path,
    dry_run: bool,
    prepare: Callable[[Mapping[str, Any]], None] | None = None,
    points: Sequence[Point] | None = None,
    check: Callable[[Mapping[str, Any]], None] | None = None,
) -> int | None:
    """Run what is left of a grid, or of some of its points, or list it.

    ``check`` looks at the settings of all by name, ``prepare`` at the same before the first run. Returns the exit
    status of :func:`~lit_edit.sweeps.points.run_points`; ``None`` after a listing.
    """
    from lit_edit.sweeps.points import check_begun, list_points, parse_points, run_points

    points = grid.points if points is None else points
    settings = parse_points(grid, points)
    if check is not None:
        check(settings)
    check_begun(folder, points, settings)
    if dry_run:
        sys.stdout.write(list_points(grid, points, folder))
        return None
    if prepare is not None:
        prepare(settings)
    return run_points(grid, folder, points, settings)


def say_report(text: str, folder: Path, *files: str) -> None:
    """Show a study's tables, and say where they are."""
    sys.stdout.write(f"\n{text}\nEverything is in {folder}/ ({', '.join(files)})\n")


def say_how_to_go_on(study: str, args: Sequence[str], why: str = "interrupted; go on with") -> None:
    """Say with which command a study that was cut goes on."""
    sys.stderr.write(f"\nlit-edit: {why}\n  {shlex.join(['lit-edit', 'study', study, *args])}\n")
