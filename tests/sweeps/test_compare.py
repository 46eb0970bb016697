"""Comparisons: what is refused before anything runs, what is kept, the table, and the picture."""

from __future__ import annotations

import csv
import json
import math
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import yaml
from matplotlib.figure import Figure

from lit_edit.cli.editors import configs_of, editor_names
from lit_edit.cli.main import main
from lit_edit.console.children import ProcessLine
from lit_edit.console.configs import config_root
from lit_edit.console.fit_parser import FitParser
from lit_edit.loggers.run_csv import read_rows
from lit_edit.sweeps.comparison import COMPARED, Course, draw_comparison, read_course
from tests.cli.test_main import FAST
from tests.sweeps.test_sweep import Pretended

SMALL = """
name: small
base: [counterfact, callbacks/compare]
settings: {data.source: builtin, data.limit: 2}
grid:
  editor:
    d4s: {config: method/d4s}
    memit: {config: method/memit}
    all at once: {config: method/memit, data.batch_size: 1000}
"""
NAMES = ["d4s", "memit", "all-at-once"]


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pretended:
    """Processes that only write a summary, or fail."""
    monkeypatch.chdir(tmp_path)
    made = Pretended()
    monkeypatch.setattr(ProcessLine, "run", lambda line, *args: made.run(line, *args))
    (tmp_path / "small.yaml").write_text(SMALL)
    return made


def run(*args: str, config: str = "small.yaml") -> int:
    return main(["compare", "--config", config, *args])


# ---- the real thing, on a tiny model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison of an editor that fails, and one behind it."""
    place = tmp_path_factory.mktemp("compared")
    fixed: dict[str, Any] = dict(word.removeprefix("--").split("=") for word in FAST)
    del fixed["model.editor.init_args.layers"]
    fixed |= {"model.language_model.name": str(tiny_folder), "data.limit": 3, "trainer.accelerator": "cpu"}
    retention = {"class_path": "lit_edit.callbacks.Retention", "init_args": {"every": 1}}
    norms = {"class_path": "lit_edit.callbacks.LayerNorms"}
    fixed["trainer.callbacks"] = [retention, norms, {"class_path": "lit_edit.callbacks.RunFolder"}]
    layers = "model.editor.init_args.layers"
    grid = {
        "name": "tiny",
        "base": ["quickstart"],
        "settings": fixed,
        "grid": {
            "editor": {
                "no such layer": {"config": "method/memit", layers: [1, 99]},
                "d4s": {"config": "method/d4s", layers: [1, 2]},
            }
        },
    }
    (place / "tiny.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_EDIT_CACHE", str(place / "cache"))
        assert run("--runs_dir", str(place / "runs"), config=str(place / "tiny.yaml")) == 1
    return place / "runs" / "sweeps" / "tiny"


def again(compared: Path, *args: str) -> int:
    return run("--runs_dir", str(compared.parents[1]), *args, config=str(compared.parents[2] / "tiny.yaml"))


def test_the_table_is_what_the_run_says(compared: Path) -> None:
    failed, row = json.loads((compared / "compare.json").read_text())["editors"]
    assert (row["editor"], row["edits"], row["state"], row["error"]) == ("d4s", 3, "done", None)
    summary = json.loads((compared / "d4s" / "summary.json").read_text())
    for column, (stage, kind, name) in COMPARED.items():
        assert row[column] == summary[stage][kind][name], column
        assert failed[column] is None
    before, after = summary["base"]["perplexity"], summary["final"]["perplexity"]
    assert row["perplexity change"] == after / before - 1
    growth = max(norms["mean_abs_after"] / norms["mean_abs_before"] for norms in summary["layers"].values())
    assert row["largest growth of mean |W|"] == pytest.approx(growth - 1)
    assert row["seconds per edit"] == summary["seconds"]["per_edit"] > 0
    with (compared / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [line["perplexity change"] for line in rows] == ["", repr(row["perplexity change"])]
    assert f"| {row['efficacy accuracy at the edit']:.3f} " in (compared / "compare.md").read_text()


def test_an_editor_that_fails_is_reported_and_the_others_run(
    compared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = json.loads((compared / "compare.json").read_text())["editors"][0]
    assert (failed["editor"], failed["edits"]) == ("no such layer", None)
    assert failed["state"].startswith("failed (exit status")
    assert "99" in failed["error"]
    assert f"- no such layer: {failed['error']}" in (compared / "compare.md").read_text()
    assert again(compared, "--gather") == 0
    out = capsys.readouterr().out
    assert f"no such layer failed: {failed['error']}\n" in out
    row = next(line.split() for line in out.splitlines() if line.split()[:1] == ["d4s"])
    assert row[1:3] == ["done", "3"]


def test_finished_editors_are_kept(
    compared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(ProcessLine, "run", lambda line, command, *rest: asked.append(command) or 1)
    before = (compared / "d4s" / "summary.json").stat().st_mtime_ns
    assert again(compared) == 1
    assert [command[command.index("--run_name") + 1] for command in asked] == ["no-such-layer"]
    assert asked[0][-2:] == ["--resume", "auto"]
    assert capsys.readouterr().out.count("done already") == 1
    assert (compared / "d4s" / "summary.json").stat().st_mtime_ns == before


def test_courses_hold_what_the_runs_have_logged(compared: Path) -> None:
    course = read_course("d4s", "done", compared / "d4s")
    _, rows = read_rows(compared / "d4s" / "metrics.csv")
    summary = json.loads((compared / "d4s" / "summary.json").read_text())
    assert course.edits == 3
    assert course.label == "d4s"
    assert course.base["perplexity"] == summary["base"]["perplexity"]
    assert course.base["efficacy/accuracy"] == summary["base"]["efficacy"]["accuracy"]
    assert [edits for edits, _ in course.series["perplexity"]] == [1, 2, 3]
    assert course.series["perplexity"][0][1] == float(rows[1]["retention/perplexity"])
    assert course.series["locality/success"][-1][1] == summary["final"]["locality"]["success"]
    assert [edits for edits, _ in course.series["mean |W|"]] == [0, 1, 2, 3]
    grown = max(norms["mean_abs_after"] / norms["mean_abs_before"] for norms in summary["layers"].values())
    assert course.series["mean |W|"][-1][1] == pytest.approx(grown)
    assert read_course("x", "not run", compared / "gone") == Course("x", "not run")


def test_the_figure_is_a_picture(compared: Path) -> None:
    height, width = matplotlib.image.imread(compared / "compare.png").shape[:2]
    assert width > 1.5 * height > 1000


# ---- the picture --------------------------------------------------------------------------------------------------

BASE = {"efficacy/success": 0.1, "generalization/success": 0.1, "locality/success": 0.8, "perplexity": 20.0}


def course(name: str, state: str = "done", edits: int = 4, perplexity: tuple[float, ...] = (20, 21, 22, 23)) -> Course:
    shares = {kind: [(n, 0.9) for n in range(1, edits + 1)] for kind in list(BASE)[:3]}
    texts = {"perplexity": list(enumerate(perplexity[:edits], 1)), "mean |W|": [(0, 1.0), (edits, 1.01)]}
    return Course(name, state, edits, {**BASE, "mean |W|": 1.0}, {**shares, **texts})


def panels(figure: Figure) -> dict[str, Any]:
    return {axis.get_gid(): axis for axis in figure.axes}


def lines(axis: Any, gid: str) -> list[Any]:
    return [line for line in axis.lines if line.get_gid() == gid]


def test_every_panel_has_a_line_per_editor_and_the_base() -> None:
    names = [f"editor {number}" for number in range(10)]
    found = panels(draw_comparison([course(name) for name in names]))
    assert list(found) == [*BASE, "mean |W|", "legend"]
    looks = set()
    for quantity in (*BASE, "mean |W|"):
        [base] = lines(found[quantity], "base")
        assert base.get_ydata()[0] == {**BASE, "mean |W|": 1.0}[quantity]
        assert base.get_linestyle() == "--"
        for name in names:
            [line] = lines(found[quantity], name)
            assert line.get_xdata()[-1] == 4
            looks.add((name, line.get_color(), str(line._dash_pattern)))
        widths = [lines(found[quantity], name)[0].get_linewidth() for name in names]
        assert widths == sorted(widths, reverse=True)  # where curves coincide, all are seen
    assert len(looks) == 10  # one look each, the same in every panel
    assert len({look[1:] for look in looks}) == 10
    legend = [text.get_text() for text in found["legend"].get_legend().get_texts()]
    assert legend == [*names, "before the first edit"]


def test_lines_that_end_early_end_with_a_cross() -> None:
    courses = [course("a"), course("b", "failed (exit status 1)", 2), course("c", "begun", 3), Course("d", "not run")]
    found = panels(draw_comparison(courses))
    for quantity in (*BASE, "mean |W|"):
        assert [list(end.get_xdata()) for end in lines(found[quantity], "end")] == [[2], [3]]
        assert [len(line.get_xdata()) for line in lines(found[quantity], "d")] == [0]
    legend = [text.get_text() for text in found["legend"].get_legend().get_texts()]
    assert legend[:4] == ["a", "b (failed after 2 edits)", "c (3 edits so far)", "d (not run)"]
    assert legend[-1] == "ends before the stream does"


def test_curves_that_explode_are_drawn_on_a_logarithmic_axis() -> None:
    found = panels(draw_comparison([course("a"), course("b", perplexity=(20, 500, 9000, math.inf))]))
    assert found["perplexity"].get_yscale() == "log"
    assert "logarithmic" in found["perplexity"].get_title(loc="left")
    assert found["mean |W|"].get_yscale() == "linear"
    [mark] = lines(found["perplexity"], "not finite")
    assert list(mark.get_xdata()) == [4]
    assert found["perplexity"].get_ylim()[1] < 1e5
    assert panels(draw_comparison([course("a")]))["perplexity"].get_yscale() == "linear"


def test_small_differences_look_small() -> None:
    found = panels(draw_comparison([course("a", perplexity=(20, 20, 20.01, 20.01))]))
    low, high = found["perplexity"].get_ylim()
    assert high - low >= 1
    low, high = found["locality/success"].get_ylim()
    assert high - low >= 0.2


def test_the_measure_is_the_wanted_one_or_the_one_there_is() -> None:
    only = Course("a", "done", 1, {}, {"efficacy/accuracy": [(1, 0.5)], "locality/agreement": [(1, 0.5)]})
    expected = ["efficacy/accuracy", "generalization/success", "locality/agreement"]
    assert list(panels(draw_comparison([only])))[:3] == expected
    both = Course("a", "done", 1, {}, {"efficacy/accuracy": [(1, 0.5)], "efficacy/success": [(1, 0.5)]})
    assert "efficacy/accuracy" in panels(draw_comparison([both], "accuracy"))
    assert "efficacy/success" in panels(draw_comparison([both], "success"))


def test_nothing_to_draw_is_said() -> None:
    found = panels(draw_comparison([Course("a", "not run")]))
    assert [text.get_text() for text in found["perplexity"].texts] == ["not measured"]


# ---- what is run, and what is refused -----------------------------------------------------------------------------


def test_every_editor_is_a_fit_of_its_own(
    pretended: Pretended, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "facts.json").write_text("[]")
    assert run("--data", "facts.json", "--data.limit", "7", "--seed_everything=3", "--name", "mine") == 0
    assert pretended.names == NAMES
    parser = FitParser()
    for command in pretended.commands:
        settings = parser.parse(command[4:])
        assert settings["data"]["source"] == "file"
        assert settings["data"]["path"] == str(tmp_path / "facts.json")
        assert (settings["data"]["limit"], settings["seed_everything"]) == (7, 3)
        assert settings["runs_dir"] == str(tmp_path / "runs" / "sweeps" / "mine")
    assert "Everything is in" in capsys.readouterr().out
    assert run("--data", "facts.json", "--data.limit", "8", "--seed_everything=3", "--name", "mine") == 2
    assert "the point d4s was made with other settings (data.limit 7, now 8)" in capsys.readouterr().err


def test_a_part_of_the_editors(pretended: Pretended, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--only", "all at once", "d4s") == 0
    assert pretended.names == ["d4s", "all-at-once"]
    out = capsys.readouterr().out
    assert [line.split()[1:3] for line in out.splitlines() if line.split()[:1] == ["memit"]] == [["not", "run"]]
    assert run("--only", "memot") == 2
    assert "has the editors d4s, memit, all-at-once; did you mean memit?" in capsys.readouterr().err


def test_a_dry_run_runs_nothing(pretended: Pretended, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--dry-run") == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in out[::2]] == NAMES
    assert FitParser().parse(shlex.split(out[5])[2:])["data"]["batch_size"] == 1000
    assert not pretended.commands
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_says_how_to_go_on(pretended: Pretended, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(log: Path) -> int:
        signal.raise_signal(signal.SIGINT)
        return 130

    pretended.failing["memit"] = interrupt
    assert run("--name", "mine", "--only", "memit", "all at once", "--data.limit=3") == 130
    [command] = [line.strip() for line in capsys.readouterr().err.splitlines() if "lit-edit compare" in line]
    del pretended.failing["memit"]
    assert main(shlex.split(command)[1:]) == 0
    assert pretended.names == ["memit", "memit", "all-at-once"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "  editor:",
            "  data.shuffle_seed: [0, 1]\n  editor:",
            "a comparison has one axis, editor, got data.shuffle_seed",
        ),
        ("  editor:", "  method:", "a comparison has one axis, editor, got method"),
        ("batch_size: 1000", "limit: 5", "data.limit is set by grid: editor and by settings"),
        ("batch_size: 1000", "shuffle_seed: 5", "grid: editor: all-at-once has data.shuffle_seed=5, d4s has None"),
        ("data.batch_size: 1000", "seed_everything: 5", "all-at-once has seed_everything=5, d4s has 0"),
        ("method/memit}", "method/none}", "grid: editor: memit: --config method/none: no such file"),
        ("data.limit: 2", "data.limits: 2", "base and settings: "),
        ("grid:", "grids:", "unknown entry 'grids'"),
    ],
)
def test_files_that_are_no_comparison_are_refused(
    pretended: Pretended, tmp_path: Path, old: str, new: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert old in SMALL
    (tmp_path / "small.yaml").write_text(SMALL.replace(old, new))
    assert run() == 2
    assert message in capsys.readouterr().err
    assert not pretended.commands
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "gone.json"], "--data gone.json: no such file"),
        (["--limti", "3"], "there is no option --limti; did you mean --limit?"),
        (["--data.limit"], "argument --data.limit: expected a value"),
        (["--data.limit=x"], "data.limit"),
        (["--resume", "auto"], "error: --resume is of a single fit"),
        (["--name", "../up"], "the command line: name must be a plain folder name"),
        (["--data.batch_size=4"], "data.batch_size is set by grid: editor and by settings"),
        (["--gather", "--dry-run"], "not allowed with"),
    ],
)
def test_bad_arguments(pretended: Pretended, args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = run(*args)
    except SystemExit as stop:  # argparse
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not pretended.commands


def test_the_comparison_that_ships_parses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--dry-run", "--runs_dir", str(tmp_path), config="compare") == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2 * 4
    assert list(tmp_path.iterdir()) == []
    settings = FitParser().parse(["--config", "counterfact", "--config", "callbacks/compare"])
    kinds = [callback["class_path"].rpartition(".")[2] for callback in settings["trainer"]["callbacks"]]
    assert "Retention" in kinds
    assert "HarmGuard" not in kinds


def test_an_editor_that_cannot_be_had_is_left_out_and_the_others_run(
    pretended: Pretended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = SMALL.replace("{config: method/memit}", "{config: method/lora}") + "    mend: {config: method/mend}\n"
    (tmp_path / "small.yaml").write_text(grid)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        assert run("--dry-run") == 0
        assert 'left out: memit: LoRA needs peft, which is not installed: pip install "lit-edit[adapters]"' in (
            capsys.readouterr().out
        )
        assert not (tmp_path / "runs").exists()
        assert run() == 0
        out = capsys.readouterr().out
        assert run("--only", "memit") == 2  # nothing is left to run
        assert "lit-edit[adapters]" in capsys.readouterr().err
    assert pretended.names == ["d4s", "all-at-once"]
    assert "memit was left out: LoRA needs peft" in out
    assert "mend was left out: MEND needs a trained network" in out
    made = tmp_path / "runs" / "sweeps" / "small"
    rows = {row["editor"]: row for row in json.loads((made / "compare.json").read_text())["editors"]}
    assert [name for name, row in rows.items() if row["state"] == "left out"] == ["memit", "mend"]
    assert 'pip install "lit-edit[adapters]"' in rows["memit"]["error"]
    assert "\nLeft out:\n\n- memit: LoRA needs peft" in (made / "compare.md").read_text()
    assert run() == 0  # it is there now
    assert pretended.names == ["d4s", "all-at-once", "memit"]


def test_all_editors_are_in_the_comparison_that_ships() -> None:
    compared = yaml.safe_load((config_root() / "compare.yaml").read_text())["grid"]["editor"]
    chosen = {name for name in editor_names() for part in compared.values() if part["config"] in configs_of(name)}
    assert chosen == set(editor_names())
