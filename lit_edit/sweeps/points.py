"""The points of a sweep: checked before anything runs, then run one after another."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from lit_edit.console.children import ProcessLine
from lit_edit.console.fit_parser import FitParser, changes
from lit_edit.data.request import shorten
from lit_edit.errors import ArgumentError, UserError
from lit_edit.files.paths import without_nan, write_json
from lit_edit.runs.files import RunLockedError, journal_path, run_lock
from lit_edit.runs.reading import has_ended
from lit_edit.runs.resuming import has_all
from lit_edit.sweeps.gathering import LOG, RECORD, is_done, last_line, read_record, state_of
from lit_edit.sweeps.grids import Grid, Point


def parse_points(grid: Grid, points: Sequence[Point]) -> dict[str, Any]:
    """Return the settings of points by name; the :class:`ArgumentError` of one that ``fit`` would refuse names it."""
    parser = FitParser()
    found = {}
    for point in points:
        try:
            # Numbers that are not finite (a clamp that never clamps) stand in JSON by name.
            found[point.name] = without_nan(parser.parse(grid.arguments(point.choices)), str)
            parser.make()
        except ArgumentError as error:
            raise ArgumentError(f"{grid.path}: {_culprit(grid, point, parser)}: {error}") from None
    return found


def _culprit(grid: Grid, point: Point, parser: FitParser) -> str:
    """Say which part of a point is refused: what all have, one value, or only the values together."""
    for name, choices in (("base and settings", ()), *((f"grid: {c.axis}: {c.label}", (c,)) for c in point.choices)):
        try:
            parser.parse(grid.arguments(choices))
            parser.make()
        except ArgumentError:
            return name
    return f"the values {point} together"


def check_begun(folder: Path, points: Sequence[Point], settings: Mapping[str, Any]) -> None:
    """Refuse points that are done or begun with other settings than the grid gives them now; name the setting."""
    for point in points:
        run = folder / point.name
        before = read_record(run).get("settings")
        if before is None or not (journal_path(run).is_file() or is_done(run)):
            continue
        different = changes(before, settings[point.name])
        if has_ended(run):  # one function decides about data, wherever a run is gone on with
            different.pop("data.limit", None)
        for name, (old, new) in different.items():
            raise ArgumentError(
                f"the point {point.name} was made with {name}={shorten(str(old))}, the grid now gives it "
                f"{shorten(str(new))}: give it another name ('name:' in the grid) or --runs_dir, or delete {run}"
            )
        try:
            _has_all(run, settings[point.name])
        except UserError as error:
            raise ArgumentError(f"the point {point.name} of {run}: {error}") from error


def _has_all(run: Path, settings: Mapping[str, Any]) -> bool:
    """Tell whether a point is done with all data that it is given now."""
    return is_done(run) and (not has_ended(run) or has_all(run, settings["data"]))


def command_of(grid: Grid, point: Point, folder: Path) -> list[str]:
    """Return the command of a point, behind the program's name."""
    own = ["--run_name", point.name, "--runs_dir", str(folder), "--resume", "auto"]
    return ["fit", *grid.arguments(point.choices), *own]


def list_points(grid: Grid, points: Sequence[Point], folder: Path) -> str:
    """Return points, how far they are, and their commands, as ``--dry-run`` shows them."""
    text = ""
    for point in points:
        line = shlex.join(["lit-edit", *command_of(grid, point, folder)])
        text += f"{point.index}  {point.name}  {state_of(folder / point.name)}\n   {line}\n"
    return text


def run_or_list(
    grid: Grid,
    folder: Path,
    dry_run: bool,
    points: Sequence[Point] | None = None,
    *,
    check: Callable[[Mapping[str, Any]], None] | None = None,
    prepare: Callable[[Mapping[str, Any]], None] | None = None,
) -> int | None:
    """Run what is left of a grid, or of some of its points; or list it (``dry_run``), which returns ``None``.

    ``check`` looks at the settings of all by name, ``prepare`` at the same before the first run.
    """
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


def run_points(grid: Grid, folder: Path, points: Sequence[Point], settings: Mapping[str, Any]) -> int:
    """Run points that are not done, one after another; one that fails does not stop the others.

    Returns the exit status: 0 all well, 1 a point has failed, 128 and a signal's number if one has stopped the sweep.
    """
    failed = elsewhere = 0
    with ProcessLine() as line:
        for number, point in enumerate(points, 1):
            if line.stopped is not None:
                break
            _say(f"point {number}/{len(points)}: {point.name} ...", end="")
            start = perf_counter()
            outcome = _run_point(line, grid, point, folder, settings[point.name])
            _say(f" {outcome}" if outcome == "done already" else f" {outcome} ({perf_counter() - start:.0f} s)")
            failed += outcome.startswith("failed")
            elsewhere += outcome == "being done elsewhere"
    if line.stopped is not None:
        return 128 + line.stopped
    if elsewhere:
        _say(f"{elsewhere} of {len(points)} points are being done by other processes; --gather when they are")
    return 1 if failed else 0


def _run_point(line: ProcessLine, grid: Grid, point: Point, folder: Path, settings: Any) -> str:
    """Run a point, if nobody has or does; return what came of it."""
    run = folder / point.name
    if _has_all(run, settings):
        return "done already"
    run.mkdir(parents=True, exist_ok=True)
    record = {"index": point.index, "values": point.labels, "settings": settings, "status": None}
    try:
        with run_lock(run):
            write_json(run / RECORD, record)
    except RunLockedError:
        return "being done elsewhere"
    command = [sys.executable, "-m", "lit_edit", *command_of(grid, point, folder)]
    status = line.run(command, run / LOG, {"WANDB_RUN_GROUP": os.environ.get("WANDB_RUN_GROUP", grid.name)})
    if line.stopped is not None:
        return "interrupted" if line.stopped == signal.SIGINT else "stopped"
    said = last_line(run / LOG)
    if status and f"another process is working in {run}" in said:
        return "being done elsewhere"
    write_json(run / RECORD, record | {"status": status})
    return "done" if status == 0 else f"failed, exit status {status}: {said} (all of it: {run / LOG})"


def _say(text: str, end: str = "\n") -> None:
    sys.stdout.write(text + end)
    sys.stdout.flush()
