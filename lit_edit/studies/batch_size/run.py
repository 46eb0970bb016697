"""``study batch-size``: the same edits in larger and larger steps (arXiv 2405.00664, 2403.14236)."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import yaml

from lit_edit.console.arguments import make_parser
from lit_edit.console.configs import find_config
from lit_edit.errors import ArgumentError
from lit_edit.studies.batch_size.report import ALL, BATCH, EDITOR, write_report
from lit_edit.studies.frame import begin_study, check_data, end_study, folder_of, run_rest, settings_of
from lit_edit.sweeps.grids import Choice, Grid, Point, read_grid, with_changes

AXES = [EDITOR, BATCH]


def run_batch_size(args: list[str]) -> int:
    """Run the study; return the exit status: 0 all well, 1 a run has failed, 128 and more for a signal."""
    options = _options(args)
    begin_study()
    whole = _grid(options)
    folder = folder_of(options.runs_dir, whole.name)
    known = [choice.label for choice in whole.axes[EDITOR]]
    if unknown := [name for name in options.only or () if name not in known]:
        raise ArgumentError(
            f"--method {unknown[0]}: there is no such editor in {whole.path}; there are {', '.join(known)}"
        )
    points = with_batches(whole, _check_edits(whole, options))
    chosen = [point for point in points if point.labels[EDITOR] in (options.only or known)]
    status = run_rest(replace(whole, points=chosen), folder, options)
    if status is None:
        return 0
    # What other calls have done stands beside it; gathered is what was chosen.
    there = [p for p in points if (folder / p.name).is_dir() or p in chosen]
    there = [p for p in chosen if (folder / p.name).is_dir()] if options.gather else there
    report = write_report(replace(whole, points=there), folder)
    return end_study("batch-size", args, status, report, folder, "batch_size")


def _options(args: list[str]) -> argparse.Namespace:
    parser = make_parser(
        "study batch-size",
        "How many edits to make in a step: the same edits in steps of 1, 4, 16, 64, 256 and all at once, for ROME "
        "(steps of 1), MEMIT, EMMET, AlphaEdit and D4S, each a 'lit-edit fit' of its own; one table and one figure. "
        "What is done is not done again; what was cut goes on.",
    )
    parser.add_limit("edits of each run; by default the config's, 64", "--edits", dest="edits")
    parser.add_data("a CounterFact file with as many edits", type=Path)
    parser.add_model(None, help="packaged model, folder or hub id; by default the config's")
    text = "these editors of the config"
    parser.add_argument("--method", aliases=("--only",), nargs="+", dest="only", metavar="EDITOR", help=text)
    parser.add_config("the runs: a YAML file", default="studies/batch_size")
    parser.add_runs("studies/<name>", "name of the study in place of the config's")
    parser.add_dry_run("the runs", "write table and figure")
    options = parser.parse_args(args)
    check_data(options)
    return options


def _grid(options: argparse.Namespace) -> Grid:
    """Read the runs; a file of other axes is refused."""
    grid = read_grid(Path(find_config(options.config)))
    if list(grid.axes) != AXES:
        raise ArgumentError(f"{grid.path}: grid: this study has the axes {', '.join(AXES)}; got {', '.join(grid.axes)}")
    return with_changes(grid, "the command line", options.name, settings_of(options))


def _check_edits(grid: Grid, options: argparse.Namespace) -> int:
    """Return how many edits each run makes; were there fewer, runs would be of another size than their table says."""
    edits = grid.settings.get("data.limit")
    if not isinstance(edits, int) or edits < 1:
        raise ArgumentError(f"{grid.path}: settings: data.limit must say how many edits each run makes, got {edits!r}")
    if options.data is not None:
        from lit_edit.data.sources import load_requests

        found = len(load_requests("file", str(options.data), edits, grid.settings.get("data.offset", 0))[0])
        if found < edits:
            raise ArgumentError(f"--limit {edits}: {options.data} has only {found}")
    return edits


def with_batches(grid: Grid, edits: int) -> list[Point]:
    """Return the points that can be and that differ.

    Left out are methods of one edit at a time in larger steps, and numbered steps of as many edits as there are, or
    more: they are "all".
    """
    from lit_edit.console.catalogue import known_editors

    one_by_one = {editor.name for editor in known_editors() if not editor.about.get("batch", True)}
    single = {choice.label: _class_of(grid, choice) in one_by_one for choice in grid.axes[EDITOR]}
    kept = []
    for point in grid.points:
        size, is_all = int(point.choices[1].settings[BATCH]), point.labels[BATCH] == ALL
        if (size == 1) if single[point.labels[EDITOR]] else (is_all or size < edits):
            kept.append(point)
    return kept


def _class_of(grid: Grid, choice: Choice) -> str:
    """Return the class of an editor, from the configs."""
    name = ""
    for config in (*grid.base, *choice.configs):
        content = yaml.safe_load(Path(find_config(config)).read_text(encoding="utf-8")) or {}
        name = ((content.get("model") or {}).get("editor") or {}).get("class_path", name)
    return str(name).rpartition(".")[2]
