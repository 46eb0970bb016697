"""``compare``: several editors on one stream, each a ``lit-edit fit`` of its own; one table and one figure.

A comparison is a sweep of one axis: same file, same folders, and ``lit-edit sweep`` takes it as well (for an array).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_edit.cli.sweep import changes_again, command_again, folder_of
from lit_edit.console.arguments import make_parser
from lit_edit.console.configs import find_config
from lit_edit.console.words import read_settings
from lit_edit.errors import ArgumentError, did_you_mean, shorten
from lit_edit.sweeps.grids import Grid, Point, read_grid, with_changes

if TYPE_CHECKING:
    from rich.table import Table

AXIS = "editor"

SAME = ("data.", "model.language_model", "seed_everything", "trainer.precision", "trainer.max_")
"""Settings that make the stream, by how their names begin: one editor's are those of all."""
OWN = ("data.batch_size", "data.target_window")
"""Settings of the data that are an editor's own: how many edits it makes at once."""


def run_compare(args: list[str]) -> int:
    """Compare editors; return the exit status: 0 all well, 1 an editor has failed, 128 and more for a signal."""
    options, settings = _options(args)
    grid = _grid(options, settings)
    folder = folder_of(grid, options.runs_dir)
    chosen = _chosen(grid, options.only)

    if options.gather:
        _report(grid, folder, options.measure)
        return 0

    from lit_edit.sweeps.points import run_or_list

    status = run_or_list(grid, folder, options.dry_run, chosen, check=partial(check_one_stream, grid))
    if status is None:
        return 0
    sys.stdout.write("\n")
    _report(grid, folder, options.measure)
    if status > 128:
        again = command_again("compare", options.config, options.runs_dir, *_words(options, settings))
        sys.stderr.write(f"\nlit-edit: interrupted; go on with\n  {again}\n")
    return status


def _options(args: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    parser = make_parser(
        "compare",
        "Run several editors on one stream (same edits, order, model and seed), each as a 'lit-edit fit' of its own, "
        "and write one table and one figure. What is done is not done again; what was cut goes on; an editor that "
        "fails does not stop the others.",
        settings=True,
    )
    parser.usage = "%(prog)s --config CONFIG [options] [--NAME.OF.A.SETTING VALUE ...]"
    parser.epilog = (
        "Settings are named as for lit-edit fit and hold for every editor, for example --data FILE, --limit 100 or "
        "--model gpt2-xl. Everything is in RUNS_DIR/sweeps/<name>/: compare.md, .csv, .json and "
        ".png, and the editors' runs. lit-edit sweep takes the same file (--array slurm)."
    )
    parser.add_config("the editors: a YAML file", required=True)
    parser.add_runs("sweeps/<name>", "name of the comparison in place of the config's")
    text = "these editors; --dry-run lists them"
    parser.add_argument("--method", aliases=("--only",), nargs="+", dest="only", metavar="NAME", help=text)
    parser.add_argument(
        "--measure", choices=["success", "accuracy"], default="success", help="what the figure shows of the edits"
    )
    parser.add_dry_run("editors", "write table and figure")
    options, rest = parser.parse_known_args(args)
    return options, read_settings(parser, rest)


def _grid(options: argparse.Namespace, settings: Mapping[str, str]) -> Grid:
    """Read the editors to compare; :class:`ArgumentError` if the file is no comparison."""
    grid = read_grid(Path(find_config(options.config)))
    if list(grid.axes) != [AXIS]:
        raise ArgumentError(
            f"{grid.path}: grid: a comparison has one axis, {AXIS}, got {', '.join(grid.axes)}; for more of them use "
            "lit-edit sweep"
        )
    return with_changes(grid, "the command line", options.name, settings)


def _chosen(grid: Grid, only: Sequence[str] | None) -> list[Point]:
    if only is None:
        return grid.points
    names = {point.name: point for point in grid.points}
    names |= {point.labels[AXIS]: point for point in grid.points}
    for name in only:
        if name not in names:
            has = ", ".join(point.name for point in grid.points)
            raise ArgumentError(
                f"--method {shorten(name)}: {grid.path} has the editors {has}{did_you_mean(name, names)}"
            )
    wanted = {names[name].index for name in only}
    return [point for point in grid.points if point.index in wanted]


def check_one_stream(grid: Grid, settings: Mapping[str, Any]) -> None:
    """Refuse editors that get other edits, in another order, or on another model; name the editor and the setting."""
    from lit_edit.files.changes import changes

    first, *others = settings
    for name in others:
        for setting, (one, other) in changes(settings[first], settings[name]).items():
            if setting.startswith(SAME) and setting not in OWN:
                raise ArgumentError(
                    f"{grid.path}: grid: {AXIS}: {name} has {setting}={shorten(str(other))}, {first} has "
                    f"{shorten(str(one))}: a comparison is on one stream, set it under 'settings' or 'base'"
                )


def _words(options: argparse.Namespace, settings: Mapping[str, str]) -> list[str]:
    """Return the arguments of this comparison behind its config."""
    only = [] if options.only is None else ["--method", *options.only]
    return [*only, *changes_again(options.name, settings)]


def _report(grid: Grid, folder: Path, measure: str) -> None:
    """Write table and figure, and print the table."""
    from lit_edit.console.tables import print_whole
    from lit_edit.sweeps.comparison import write_comparison

    rows = write_comparison(grid, folder, measure)
    print_whole(_table(grid.name, rows))
    for row in rows:
        if row["error"]:
            came = "was left out" if row["state"] == "left out" else "failed"
            sys.stdout.write(f"{row[AXIS]} {came}: {row['error']}\n")
    sys.stdout.write(f"Everything is in {folder}/ (compare.md, compare.csv, compare.json, compare.png)\n")


def _table(name: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table for a terminal: as that of ``compare.md``, with success and accuracy in one cell."""
    from rich.box import SIMPLE

    from lit_edit.console.tables import table_of
    from lit_edit.sweeps.comparison import shown
    from lit_edit.sweeps.gathering import COSTS

    headings = [AXIS, "state", ">edits", ">efficacy", ">right after\nthe edit", ">generalization", ">locality"]
    headings += [">agreement", ">perplexity", ">mean |W|", ">seconds\nper edit"]
    found = []
    for line in shown(rows):
        pairs = [
            f"{line[f'{kind} success{when}']} / {line[f'{kind} accuracy{when}']}"
            for kind, when in (("efficacy", ""), ("efficacy", " at the edit"), ("generalization", ""), ("locality", ""))
        ]
        cells = (line["agreement"], *(line[name] for name in COSTS))
        found.append((line[AXIS], line["state"], line["edits"], *pairs, *cells))
    return table_of(headings, found, whole=True, title=f"{name}: success / accuracy", box=SIMPLE)
