"""``lit-edit study d4s``: its runs, tables and figures."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from lit_edit.cli.main import main
from lit_edit.console.configs import find_config
from lit_edit.runs.ability import Asked
from lit_edit.studies.d4s.report import correlations, curve_table, growth_and_accuracy, read_points, write_part
from lit_edit.studies.d4s.run import PARTS, measure_ability, with_text
from lit_edit.sweeps.comparison import Course
from lit_edit.sweeps.grids import Grid, read_grid


def grid_of(part: str) -> Grid:
    return read_grid(Path(find_config(f"studies/d4s/{PARTS[part][0]}")))


def fill(run: Path, edits: int, points: dict[int, tuple[float, float]], **summary: Any) -> None:
    """Leave a finished run behind: accuracy and mean |W| at some numbers of edits."""
    run.mkdir(parents=True)
    rows = ["step,base/perplexity,norm/w/mean_abs_w,retention/efficacy/accuracy", "0,50,1.0,"]
    rows += [f"{number},,{width},{accuracy}" for number, (width, accuracy) in points.items()]
    (run / "metrics.csv").write_text("\n".join(rows) + "\n")
    stages: dict[str, Any] = {
        stage: {
            kind: {"success": 1.0, "accuracy": 0.5, "agreement": 1.0}
            for kind in ("efficacy", "generalization", "locality")
        }
        | {"perplexity": 50.0}
        for stage in ("base", "immediate", "final")
    }
    layers = {"w": {"mean_abs_before": 1.0, "mean_abs_after": 1.1}}
    content = {"edits": edits, **stages, "seconds": {"per_edit": 1.0}, "layers": layers, **summary}
    (run / "summary.json").write_text(json.dumps(content))
    (run / "sweep.json").write_text(json.dumps({"status": 0}))


def squeezed(table: str) -> str:
    """A Markdown table without the spaces that make its columns stand below each other."""
    return re.sub(r" +", " ", table)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_and_b_are_tables_of_the_same_runs(tmp_path: Path) -> None:
    grid = grid_of("a")
    assert [point.name for point in grid.points] == ["d4s", "alphaedit", "memit", "rome", "ft"]
    fill(tmp_path / "d4s", 75, {25: (1.0, 1.0), 50: (1.1, 0.9), 75: (1.2, 0.8)})
    fill(tmp_path / "rome", 50, {25: (1.5, 0.6), 50: (3.0, 0.2)})
    said = squeezed(write_part("a", grid, tmp_path))
    assert "| 25 | 1.000 | – | – | 0.600 | – |" in said
    assert [row["edits"] for row in rows_of(tmp_path / "a.csv")] == ["25", "50", "75"]
    write_part("b", grid, tmp_path)
    rows = {row["editor"]: row for row in rows_of(tmp_path / "b.csv")}
    assert (rows["d4s"]["Pearson"], rows["d4s"]["growth of mean |W| at the end"]) == ("-1.00", "+20.0%")
    assert rows["rome"]["Pearson"] == "–"  # of two points there is none
    assert rows["all together"]["points"] == "5"
    assert all((tmp_path / f"{part}.png").stat().st_size > 5000 for part in "ab")


def test_curves_and_their_correlation_by_hand() -> None:
    course = Course(
        "x", "done", series={"efficacy/accuracy": [(10, 0.5), (20, 0.25)], "mean |W|": [(5, 1.0), (10, 1.5), (20, 2.0)]}
    )
    assert growth_and_accuracy(course) == [(1.5, 0.5), (2.0, 0.25)]
    assert curve_table([course, Course("y", "not run")], "efficacy/accuracy")[1] == {
        "edits": "20",
        "x": "0.250",
        "y": "–",
    }
    # By hand: deviations (-1, 0, 1) and (1, 1, -2) / 3: -1 / (sqrt 2 * sqrt(6) / 3) = -0.866.
    assert correlations([(1.0, 3.0), (2.0, 3.0), (3.0, 2.0)]) == (-0.866, -0.866)


def test_d_shows_the_tasks_along_the_stream(tmp_path: Path) -> None:
    points = [
        {
            "edits": 0,
            "ability/sst2/accuracy": 0.5,
            "ability/mmlu/accuracy": 0.25,
            "ability/sst2/generated_accuracy": 0.0,
        },
        {"edits": 100, "ability/sst2/accuracy": 0.75, "ability/mmlu/accuracy": 0.25},
    ]
    fill(tmp_path / "memit", 100, {})
    (tmp_path / "memit" / "ability").mkdir()
    (tmp_path / "memit" / "ability" / "ability.json").write_text(json.dumps({"points": points}))
    assert read_points(tmp_path / "memit")[0] == {"sst2": 0.5, "mmlu": 0.25}
    said = squeezed(write_part("d", grid_of("d"), tmp_path))
    assert "| mean | memit | 0.375 | 0.500 |" in said
    assert "| sst2 | d4s | – | – |" in said
    fill(tmp_path / "run", 100, {}, ability={"points": points[:1]})  # measured along the run, as in part c
    assert read_points(tmp_path / "run") == {0: {"sst2": 0.5, "mmlu": 0.25}}


def test_d_measures_the_runs_of_a_every_hundred_edits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, seen = grid_of("d"), []
    of_a = {point.name: grid_of("a").arguments(point.choices) for point in grid_of("a").points}
    assert grid.name == grid_of("a").name  # so what part a has run is not run again
    assert [point.name for point in grid.points] == ["d4s", "memit"]
    assert all(grid.arguments(point.choices) == of_a[point.name] for point in grid.points)
    fill(tmp_path / "d4s", 250, {})
    monkeypatch.setattr("lit_edit.runs.reading.read_history", lambda run: SimpleNamespace(made=[None] * 250))
    monkeypatch.setattr("lit_edit.studies.d4s.run.measure_run", lambda *args: seen.append(args))
    measure_ability(grid, tmp_path, tmp_path)
    run = tmp_path / "d4s"
    tasks = ("sst2", "mrpc", "cola", "rte", "nli", "mmlu")
    assert seen == [(run, [0, 100, 200, 250], Asked(tasks, tmp_path), run / "ability")]  # memit has not come to its end


def test_e_has_a_line_per_variant_and_one_more_for_a_text(tmp_path: Path) -> None:
    grid = grid_of("e")
    more = with_text(grid, Path("/text.txt"))
    assert len(more.points) == len(grid.points) + 1
    assert more.arguments(more.points[-1].choices)[-1] == "--model.statistics.corpus=/text.txt"
    fill(tmp_path / grid.points[0].name, 100, {25: (1.1, 0.9)})
    assert "as it ships" in write_part("e", grid, tmp_path)


def test_nothing_done_yet_is_said(tmp_path: Path) -> None:
    assert "Nothing has been measured yet" in write_part("b", grid_of("b"), tmp_path)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--part", "a"], "--data is missing"),
        (["--part", "b", "--gather", "--runs_dir", "{file}.d"], "nothing of this part is done yet in"),
        (["--part", "c", "--gather", "--runs_dir", "{file}.d"], "nothing of this part is done yet in"),
        (["--part", "a", "--data", "none.json"], "--data none.json: no such file"),
        (["--part", "d", "--data", "{file}", "--tasks", "none"], "--task_files none: no such folder"),
        (["--part", "e", "--data", "{file}", "--text", "none.txt"], "--corpus none.txt: no such file"),
    ],
)
def test_what_is_missing_is_named(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "data.json"
    file.write_text("[]")
    assert main(["study", "d4s", *(arg.format(file=file) for arg in args)]) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_lists_the_commands_of_all_parts(
    tmp_path: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(shared_data / "counterfact_2000.json")
    words = ["--data", data, "--runs_dir", str(tmp_path), "--edits", "3", "--dry-run"]
    assert main(["study", "d4s", "--part", "a", "c", "d", *words, "--tasks", str(shared_data)]) == 0
    own = tmp_path / "studies" / "d4s-questions" / "ability.yaml"
    callbacks = yaml.safe_load(own.read_text())["trainer"]["callbacks"]
    [ability] = [c for c in callbacks if c["class_path"].endswith(".Ability")]
    assert ability["init_args"]["folder"] == str(shared_data.resolve())
    out = capsys.readouterr().out
    for config in ("method/alphaedit", "callbacks/study", "mqd_truth.json", "ability.yaml"):
        assert config in out
    assert out.count("--data.limit=3") == 5 + 3 + 2
