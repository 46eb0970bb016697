"""``sweep``: every point of a grid, each a ``lit-edit fit`` of its own, and one table of all."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from lit_edit.console.arguments import make_parser
from lit_edit.console.configs import find_config
from lit_edit.console.words import read_settings
from lit_edit.errors import ArgumentError, counted
from lit_edit.files.paths import expand, write_text
from lit_edit.sweeps.grids import Grid, Point, read_grid, with_changes


def run_sweep(args: list[str]) -> int:
    """Run a sweep; return the exit status: 0 all well, 1 a point has failed, 128 and more for a signal."""
    options, settings = _options(args)
    grid = read_grid(Path(find_config(options.config)))
    method = () if options.method is None else (options.method,)
    grid = with_changes(replace(grid, base=(*grid.base, *method)), "the command line", options.name, settings)
    folder = folder_of(grid, options.runs_dir)
    chosen = _chosen(grid, options.only)

    from lit_edit.sweeps.gathering import gather
    from lit_edit.sweeps.points import check_begun, parse_points, run_or_list

    if options.gather:
        sys.stdout.write(gather(grid, folder))
        return 0
    words = [*(f"--method={name}" for name in method), *changes_again(options.name, settings)]
    again = command_again("sweep", options.config, options.runs_dir, *words)
    if options.array:
        check_begun(folder, chosen, parse_points(grid, chosen)[0])
        script = write_script(grid, folder, again)
        sys.stdout.write(
            f"{counted(len(grid.points), 'point')}; set their resources in the script, then\n  sbatch {script}\n"
        )
        return 0
    status = run_or_list(grid, folder, options.dry_run, chosen)
    if status is None:
        return 0
    sys.stdout.write(f"\n{gather(grid, folder)}\nEverything is in {folder}/\n")
    if status > 128:
        only = "" if options.only is None else f" --only {','.join(map(str, options.only))}"
        sys.stderr.write(f"\nlit-edit: interrupted; go on with\n  {again}{only}\n")
    return status


def folder_of(grid: Grid, runs_dir: str) -> Path:
    """Return where a sweep keeps its runs and tables."""
    return expand(runs_dir).resolve() / "sweeps" / grid.name


def _options(args: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    parser = make_parser(
        "sweep",
        "Run every point of a grid, each as a 'lit-edit fit' of its own, and gather one table. What is done is not "
        "done again; what was cut goes on.",
        settings=True,
        usage="%(prog)s --config CONFIG [options] [--NAME.OF.A.SETTING VALUE ...]",
        epilog="Settings are named as for lit-edit fit and hold for every point: --limit 100, --model NAME.",
    )
    parser.add_config("the grid: a YAML file", required=True)
    parser.add_runs("sweeps/<name>", "name of the sweep in place of the grid's")
    parser.add_method(None, help="the editor of points for which the grid names none: rome, or a YAML file")
    parser.add_argument(
        "--only", type=_indexes, default=None, metavar="INDEX[,INDEX]", help="these points; --dry-run lists them"
    )
    parser.add_dry_run("points", "write the table").add_argument(
        "--array", choices=["slurm"], default=None, help="write a script that runs the points as a SLURM array"
    )
    options, rest = parser.parse_known_args(args)
    return options, read_settings(parser, rest)


def _indexes(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"expected numbers of points (3 or 0,2,5), got {text!r}")
    return [int(part) for part in text.split(",")]


def _chosen(grid: Grid, only: list[int] | None) -> list[Point]:
    if only is None:
        return grid.points
    for index in only:
        if index >= len(grid.points):
            raise ArgumentError(f"--only {index}: {grid.path} has the points 0 to {len(grid.points) - 1}")
    return [grid.points[index] for index in dict.fromkeys(only)]


def write_script(grid: Grid, folder: Path, command: str) -> Path:
    """Write the script of a SLURM array into the sweep's folder; one that is there keeps what was set in it."""
    script, last = folder / "sweep.sbatch", len(grid.points) - 1
    if script.is_file():
        old = script.read_text(encoding="utf-8")
        text = re.sub(r"(?m)^#SBATCH --array=\d+-\d+", f"#SBATCH --array=0-{last}", old)
    else:
        told = {"name": grid.name, "last": last, "folder": folder, "command": command, "script": script}
        template = files("lit_edit.sweeps").joinpath("array.sbatch").read_text(encoding="utf-8")
        text = template.format(**told, here=shlex.quote(str(Path.cwd())))
    write_text(script, text)
    return script


def command_again(command: str, name: str, runs_dir: str, *words: str) -> str:
    """Return the command of a sweep, for use in any folder."""
    config = str(Path(name).resolve()) if os.path.isfile(name) else name
    runs = str(expand(runs_dir).resolve())
    return shlex.join(["lit-edit", command, "--config", config, "--runs_dir", runs, *words])


def changes_again(name: str | None, settings: Mapping[str, str]) -> list[str]:
    """Return the arguments that change what a grid's file says."""
    return [*([] if name is None else ["--run_name", name]), *(f"--{key}={value}" for key, value in settings.items())]
