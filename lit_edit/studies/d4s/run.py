"""``study d4s``: the questions of the D4S paper (arXiv 2410.23843), asked again of a model of one's own."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import yaml

from lit_edit.console.arguments import make_parser
from lit_edit.console.configs import find_config
from lit_edit.errors import ArgumentError
from lit_edit.files.paths import write_text
from lit_edit.runs.ability import Asked, measure_run
from lit_edit.studies.frame import (
    begin_study,
    check_data,
    check_files,
    folder_of,
    run_rest,
    say_how_to_go_on,
    say_report,
    settings_of,
)
from lit_edit.sweeps.grids import Choice, Grid, Point, read_grid, with_changes

PARTS: Mapping[str, tuple[str, str]] = {
    "a": ("stream", "what five editors have kept of a stream, every 25 edits"),
    "b": ("stream", "mean |W| of the edited layers beside it (the same runs), and the correlation of the two"),
    "c": ("questions", "what edits of MQD's kinds of questions do to general ability"),
    "d": ("ability", "general ability of D4S and MEMIT along a stream (two of the runs of part a)"),
    "e": ("ablation", "D4S with other residuals, layers, lambda and statistics"),
}
"""By name: the runs (``configs/studies/d4s``), and the question."""


def run_d4s(args: list[str]) -> int:
    """Run parts of the study; return the exit status: 0 all well, 1 a run has failed, 128 and more for a signal."""
    options = _options(args)
    begin_study()
    status = 0
    for part in dict.fromkeys(options.part):
        status = max(status, _run_questions(options) if part == "c" else _run_part(options, part))
        if status > 128:
            say_how_to_go_on("d4s", args)
            break
    return status


def _options(args: list[str]) -> argparse.Namespace:
    parser = make_parser(
        "study d4s",
        "The questions of the D4S paper, part by part; each part is a few 'lit-edit fit' runs and writes a table and "
        "a figure. What is done is not done again; what was cut goes on.",
    )
    parser.epilog = "parts: " + "; ".join(f"{name}: {question}" for name, (_, question) in PARTS.items())
    parser.add_argument("--part", nargs="+", choices=tuple(PARTS), default=list(PARTS), help="by default all of them")
    parser.add_data("a CounterFact file (all parts but c)", type=Path)
    parser.add_task_files("parts c and d", "--tasks")
    text = "plain text for key statistics, a line more in part e"
    parser.add_argument("--corpus", aliases=("--text",), dest="text", type=Path, metavar="FILE", help=text)
    parser.add_limit("edits of each run; by default the config's", "--edits", dest="edits")
    text = "packaged model, folder or hub id, edited at the layers of the methods' configs; by default the config's"
    parser.add_model(None, help=text)
    parser.add_runs("studies/d4s-...")
    parser.add_dry_run("the runs", "write tables and figures")
    options = parser.parse_args(args)
    if set(options.part) - {"c"}:
        check_data(options)
    check_files(data=options.data, corpus=options.text)
    if options.task_files is not None and not options.task_files.is_dir():
        raise ArgumentError(f"--task_files {options.task_files}: no such folder")
    return options


def _run_part(options: argparse.Namespace, part: str) -> int:
    """Run what is left of a part, and write its table and figure."""
    grid = read_grid(Path(find_config(f"studies/d4s/{PARTS[part][0]}")))
    folder = folder_of(options.runs_dir, grid.name)
    grid = with_changes(grid, "the command line", None, settings_of(options))
    if part == "e" and options.text is not None:
        grid = with_text(grid, options.text.resolve())

    from lit_edit.studies.d4s.report import write_part

    status = run_rest(grid, folder, options, "part")
    if status is None:
        return 0
    if part == "d" and status <= 128 and not options.gather:
        measure_ability(grid, folder, options.task_files)
    say_report(write_part(part, grid, folder), folder, part)
    return status


def measure_ability(grid: Grid, folder: Path, tasks: Path | None) -> None:
    """Measure general ability on the finished runs of a part: before the first edit, every 100, and at the end.

    ``tasks`` is a folder with a file per task; ``None`` takes them from the hub.
    """
    from lit_edit.ability.tasks import all_tasks
    from lit_edit.runs.reading import read_history
    from lit_edit.sweeps.gathering import is_done

    for point in grid.points:
        run = folder / point.name
        if is_done(run):
            made = len(read_history(run).made)
            numbers = sorted({*range(0, made, 100), made})
            measure_run(run, numbers, Asked(tuple(all_tasks()), tasks), run / "ability")


def _run_questions(options: argparse.Namespace) -> int:
    """Run the study of MQD with tasks, and write what became of them."""
    from lit_edit.studies.d4s.report import write_part
    from lit_edit.studies.mqd.run import run_mqd

    grid = read_grid(Path(find_config("studies/d4s/questions")))
    folder = folder_of(options.runs_dir, grid.name)
    if options.gather:
        run_rest(grid, folder, options, "part")  # refuses where there is nothing
    # A listing writes the config too: its commands read it.
    config = _with_own_base(grid, folder, None if options.gather else options.task_files)
    words = ["--config", str(config), "--runs_dir", options.runs_dir]
    words += [] if options.edits is None else ["--edits", str(options.edits)]
    words += [] if options.model is None else ["--model", options.model]
    words += [f"--{name}" for name in ("gather", "dry-run") if getattr(options, name.replace("-", "_"))]
    status = run_mqd(words)
    if not options.dry_run:
        say_report(write_part("c", grid, folder), folder, "c")
    return status


def _with_own_base(grid: Grid, folder: Path, tasks: Path | None) -> Path:
    """Return the file of a grid, or of a copy of it whose tasks come from a folder."""
    if tasks is None:
        return grid.path
    ability = yaml.safe_load(Path(find_config("callbacks/ability")).read_text(encoding="utf-8"))
    for callback in ability["trainer"]["callbacks"]:
        if callback["class_path"].endswith(".Ability"):
            callback["init_args"]["folder"] = str(tasks.resolve())
    content = yaml.safe_load(grid.path.read_text(encoding="utf-8"))
    own = str(folder / "ability.yaml")
    content["base"] = [own if config == "callbacks/ability" else config for config in content["base"]]
    for name, made in (("ability.yaml", ability), ("grid.yaml", content)):
        write_text(folder / name, yaml.safe_dump(made, sort_keys=False, allow_unicode=True))
    return folder / "grid.yaml"


def with_text(grid: Grid, text: Path) -> Grid:
    """Return the grid with one more point: key statistics from a text in place of what the model samples."""
    [axis] = grid.axes
    choice = Choice(axis, "statistics of text", "statistics-of-text", (), {"model.statistics.corpus": str(text)})
    point = Point(len(grid.points), choice.part, (choice,))
    return replace(grid, axes={axis: [*grid.axes[axis], choice]}, points=[*grid.points, point])
