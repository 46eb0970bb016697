"""``study mqd``: the targets of MQD's three kinds on the unedited model, and what edits of each kind do to it."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_edit.console.arguments import make_parser
from lit_edit.console.configs import find_config
from lit_edit.errors import ArgumentError
from lit_edit.files.paths import write_json
from lit_edit.studies.frame import begin_study, end_study, folder_of, run_rest, say, settings_of
from lit_edit.studies.mqd.making import add_mqd_arguments, write_mqd
from lit_edit.sweeps.grids import Choice, Grid, read_grid, with_changes

if TYPE_CHECKING:
    from lit_edit.data.request import EditRequest

AXIS = "kind"
TARGETS = "targets.json"
"""In the study's folder: what was measured of the targets."""


def run_mqd(args: list[str]) -> int:
    """Run the study; return the exit status: 0 all well, 1 a kind's run has failed, 128 and more for a signal."""
    options = _options(args)
    begin_study()

    from lit_edit.data.events import read_events
    from lit_edit.data.mqd import build_mqd

    made = build_mqd(read_events(options.events, options.split), seed=options.seed)
    grid = _grid(options, list(made))
    folder = folder_of(options.runs_dir, grid.name)
    edits = _check_edits(grid, made)
    grid = with_paths(grid, {kind: folder / "data" / f"mqd_{kind}.json" for kind in made})

    from lit_edit.studies.mqd.report import write_report

    def prepare(settings: Mapping[str, Any]) -> None:
        _keep_data(folder / "data", made)
        _keep_targets(folder / TARGETS, grid, settings, made, edits)

    status = run_rest(grid, folder, options, prepare=prepare, proof=TARGETS)
    if status is None:
        return 0
    report = write_report(grid, folder, json.loads((folder / TARGETS).read_text(encoding="utf-8")))
    return end_study("mqd", args, status, report, folder, "mqd")


def _options(args: list[str]) -> argparse.Namespace:
    parser = make_parser(
        "study mqd",
        "What the kind of question does to sequential editing: makes MQD, measures perplexity and diversity of the "
        "targets of its three kinds on the unedited model, makes the same number of edits of each kind, each a "
        "'lit-edit fit' of its own, and writes one table and one figure. What is done is not done again; what was cut "
        "goes on.",
    )
    parser.add_limit("edits of each kind; by default the config's, 20", "--edits", dest="edits")
    parser.add_model(None, help="packaged model, folder or hub id; by default the config's")
    parser.add_method("method/d4s")
    add_mqd_arguments(parser)
    parser.add_config("the three runs: a YAML file", default="studies/mqd")
    parser.add_runs("studies/<name>", "name of the study in place of the config's")
    parser.add_dry_run("the runs", "write table and figure")
    return parser.parse_args(args)


def _grid(options: argparse.Namespace, kinds: Sequence[str]) -> Grid:
    """Read the runs; a file of others than one for each kind is refused."""
    grid = read_grid(Path(find_config(options.config)))
    labels = [point.labels.get(AXIS) for point in grid.points]
    if list(grid.axes) != [AXIS] or sorted(map(str, labels)) != sorted(kinds):
        raise ArgumentError(
            f"{grid.path}: grid: this study has one axis, {AXIS}, with the values {', '.join(kinds)}; got "
            f"{', '.join(grid.axes)} with {', '.join(str(point) for point in grid.points)}"
        )
    grid = with_changes(grid, "the command line", options.name, settings_of(options))
    return replace(grid, base=(*grid.base, options.method))


def _check_edits(grid: Grid, made: Mapping[str, Sequence[EditRequest]]) -> int:
    """Return how many edits each run makes; as many requests are needed."""
    most = min(map(len, made.values()))
    edits = grid.settings.get("data.limit")
    if edits is not None and (not isinstance(edits, int) or not 1 <= edits <= most):
        raise ArgumentError(
            f"--limit must be from 1 to {most} (requests of each kind that the events allow), got {edits}"
        )
    return edits or most


def with_paths(grid: Grid, paths: Mapping[str, Path]) -> Grid:
    """Return the grid with a file of its own for each kind."""

    def placed(choice: Choice) -> Choice:
        return replace(choice, settings=choice.settings | {"data.path": str(paths[choice.label])})

    axes = {axis: [placed(choice) for choice in choices] for axis, choices in grid.axes.items()}
    points = [replace(point, choices=tuple(map(placed, point.choices))) for point in grid.points]
    return replace(grid, axes=axes, points=points)


def _keep_data(folder: Path, made: Mapping[str, Sequence[EditRequest]]) -> None:
    """Write the data; where other data is, the runs were begun with that."""
    for kind, requests in made.items():
        path = folder / f"mqd_{kind}.json"
        if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != [r.as_dict() for r in requests]:
            raise ArgumentError(
                f"{path} was made of other events or with another seed: give the study another --name, or delete "
                f"{folder.parent}"
            )
    write_mqd(folder, made)


# ---- the targets on the unedited model ----------------------------------------------------------------------------


def _keep_targets(
    path: Path, grid: Grid, settings: Mapping[str, Any], made: Mapping[str, Sequence[EditRequest]], edits: int
) -> None:
    """Measure the targets, unless that was done with this model, this data and this many edits."""
    model = settings[grid.points[0].name]["model"]["language_model"]
    data = json.dumps([r.as_dict() for requests in made.values() for r in requests], ensure_ascii=False)
    key = {"model": model, "data": hashlib.sha256(data.encode()).hexdigest(), "edits": edits}
    if path.is_file() and all(json.loads(path.read_text(encoding="utf-8")).get(name) == key[name] for name in key):
        return
    say("measuring the targets on the unedited model ...")

    from lit_edit.console.fit_parser import FitParser
    from lit_edit.metrics.diversity import describe_targets
    from lit_edit.models import ModelAdapter

    parser = FitParser()
    parser.parse(grid.arguments(grid.points[0].choices))
    language_model = parser.make().model.language_model
    loaded, tokenizer = language_model.load()
    adapter = ModelAdapter(loaded, language_model.arch, products=language_model.products)
    rows = [
        {AXIS: kind, "of": of, **asdict(describe_targets(adapter, tokenizer, requests[:count]))}
        for of, count in {"all": None, "edited": edits}.items()
        for kind, requests in made.items()
    ]
    write_json(path, {**key, "targets": rows})
