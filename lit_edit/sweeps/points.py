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
from lit_edit.console.fit_parser import FitParser, decides
from lit_edit.errors import ArgumentError, NotHereError, UserError
from lit_edit.files.changes import refuse_changes
from lit_edit.files.paths import without_nan, write_json
from lit_edit.runs.files import RunLockedError, journal_path, run_lock
from lit_edit.runs.reading import has_ended
from lit_edit.runs.resuming import has_all
from lit_edit.sweeps.gathering import LOG, RECORD, is_done, last_line, read_record, state_of
from lit_edit.sweeps.grids import Grid, Point


def parse_points(grid: Grid, points: Sequence[Point]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the settings of points by name, and by name why others cannot be had here.

    Raises:
        ArgumentError: If ``fit`` would refuse one, which is named, or if none can be had.
    """
    parser = FitParser()
    found, left_out = {}, {}
    for point in points:
        try:
            # Numbers that are not finite (a clamp that never clamps) stand in JSON by name.
            settings = without_nan(parser.parse(grid.arguments(point.choices)), str)
            parser.make()
            found[point.name] = settings
        except ArgumentError as error:
            if (missing := _missing(error)) is not None:
                left_out[point.name] = str(missing)
                continue
            raise ArgumentError(f"{grid.path}: {_culprit(grid, point, parser)}: {error}") from None
    if not found:
        raise NotHereError("; ".join(f"{name}: {reason}" for name, reason in left_out.items()))
    return found, left_out


def _missing(error: BaseException | None) -> NotHereError | None:
    """Return what cannot be had here, if that is what an error comes from; the parser wraps it in its own."""
    while error is not None and not isinstance(error, NotHereError):
        error = error.__cause__ or error.__context__
    return error


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
        ended = has_ended(run)  # then one function decides about data, wherever a run is gone on with
        refuse_changes(
            f"the point {point.name} was made",
            before,
            settings[point.name],
            f"give it another name ('name:' in the grid) or --runs_dir, or delete {run}",
            lambda name, ended=ended: decides(name) and not (ended and name == "data.limit"),  # type: ignore[misc]
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
    settings, left_out = parse_points(grid, points)
    points = [point for point in points if point.name in settings]
    if check is not None:
        check(settings)
    check_begun(folder, points, settings)
    if dry_run:
        sys.stdout.write(list_points(grid, points, folder))
        _say_left_out(left_out)
        return None
    for name in left_out:
        leave_out(folder / name, left_out[name])
    _say_left_out(left_out)
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


def leave_out(run: Path, reason: str) -> None:
    """Note in a point's folder why it was not run; what was made of it before is kept."""
    if not is_done(run):
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / RECORD, read_record(run) | {"status": None, "left_out": reason})


def _say_left_out(left_out: Mapping[str, str]) -> None:
    for name, reason in left_out.items():
        _say(f"left out: {name}: {reason}")


def _say(text: str, end: str = "\n") -> None:
    sys.stdout.write(text + end)
    sys.stdout.flush()
