"""Sweeps: what a grid spans, what is refused before anything runs, who runs what, and the table."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_edit.cli.main import main
from lit_edit.cli.sweep import run_sweep
from lit_edit.console.children import ProcessLine
from lit_edit.console.configs import config_root, find_config
from lit_edit.console.fit_parser import FitParser
from lit_edit.errors import ArgumentError
from lit_edit.runs.files import run_lock
from lit_edit.sweeps.grids import Grid, read_grid
from tests.cli.test_main import FAST


def grid_of(folder: Path, text: str) -> Grid:
    path = folder / "grid.yaml"
    path.write_text(text, encoding="utf-8")
    return read_grid(path)


# ---- grids --------------------------------------------------------------------------------------------------------

FULL = """
name: editors
base: [quickstart, own.yaml]
settings: {data.limit: 100}
grid:
  method: {d4s: {config: method/d4s}, plain: {config: [a, b], model.editor.init_args.contexts: plain}}
  data.shuffle_seed: [0, null]
  model.editor.init_args.layers: {all five: [6, 7, 8, 9, 10], top: [10]}
"""


def test_a_grid_spans_all_combinations(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, FULL)
    assert [point.name for point in grid.points] == [
        f"{method}+shuffle_seed={seed}+{layers}"
        for method in ("d4s", "plain")
        for seed in ("0", "null")
        for layers in ("all-five", "top")
    ]
    assert [point.index for point in grid.points] == list(range(8))
    assert grid.points[-1].labels == {
        "method": "plain",
        "data.shuffle_seed": "null",
        "model.editor.init_args.layers": "top",
    }
    assert grid.arguments(grid.points[-1].choices) == [
        *("--config", "quickstart", "--config", "own.yaml", "--config", "a", "--config", "b"),
        "--data.limit=100",
        "--model.editor.init_args.contexts=plain",
        "--data.shuffle_seed=null",
        "--model.editor.init_args.layers=[10]",
    ]


def test_names_of_plain_values(tmp_path: Path) -> None:
    text = "base: quickstart\ngrid: {%s}"
    for axis, names in (
        ("config: [method/d4s, method/memit]", ["d4s", "memit"]),
        ("data.limit: [1, 2]", ["limit=1", "limit=2"]),
        ("model.editor.init_args.layers: [[6, 7, 8], [6, 8], [7]]", ["layers=6-8", "layers=6.8", "layers=7"]),
        ("data.path: [/a/b c.json, d.json]", ["path=a-b-c.json", "path=d.json"]),
        ("a.seed: [1], b.seed: [true]", ["a.seed=1+b.seed=true"]),
        ("x.y: [.5, .inf]", ["y=0.5", "y=.inf"]),
    ):
        grid = grid_of(tmp_path, text % axis)
        assert [point.name for point in grid.points] == names
        assert grid.name == "grid"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "a grid has the entries name, base"),
        ("base: a\ngrids: {}", "unknown entry 'grids'"),
        ("grid: {a.b: [1]}", "base: expected names or files of configs"),
        ("base: a", "grid must hold the axes by name"),
        ("base: a\ngrid: {}", "grid must hold the axes by name"),
        ("base: a\ngrid: {data.limit: []}", "grid: data.limit: expected a list of values"),
        ("base: a\ngrid: {data.limit: 3}", "grid: data.limit: expected a list of values"),
        ("base: a\ngrid: {method: [d4s]}", "named after the setting"),
        ("base: a\ngrid: {m: [{config: b}]}", "needs a label"),
        ("base: a\ngrid: {m: {x: {config: 3}}}", "expected names or files of configs"),
        ("base: a\ngrid: {m: {x: {limit: 3}}}", "'limit' is no setting"),
        ("base: a\ngrid: {run_name: [x]}", "named after the setting"),
        ("base: a\ngrid: {m: {x: {run_name: y}}}", "run_name is the sweep's own"),
        ("base: a\nsettings: {resume: never}\ngrid: {a.b: [1]}", "resume is the sweep's own"),
        ("base: a\nsettings: {config: b}\ngrid: {a.b: [1]}", "configs stand under base"),
        ("base: a\nsettings: [1]\ngrid: {a.b: [1]}", "expected settings by name"),
        ("base: a\nsettings: {a.b: 2024-01-01}\ngrid: {a.c: [1]}", "expected a number, text, list"),
        ("base: a\nsettings: {a.b: 1}\ngrid: {a.b: [1]}", "a.b is set by grid: a.b and by settings"),
        ("base: a\ngrid: {m: {x: {a.b: 1}}, a.b: [1]}", "a.b is set by grid: a.b and by grid: m"),
        ("base: a\ngrid: {a.b: [1], a.b: [2]}", "'a.b' stands twice"),
        ("base: a\ngrid: {a.b: [1, 1]}", "two points have the name b=1"),
        ("base: a\ngrid: {a.b: [x/y, x y]}", "two points have the name b=x-y"),
        ("base: a\ngrid: {m: {X: {a.b: 1}, x: {a.b: 2}}}", "two points have the name x"),
        ("base: a\ngrid: {m: {' ': {a.b: 1}}}", "cannot name a folder"),
        (f"base: a\ngrid: {{a.b: [{'x' * 130}]}}", "more than 120 characters"),
        ("name: ../up\nbase: a\ngrid: {a.b: [1]}", "plain folder name"),
        ("base: [a\n", "bad YAML"),
    ],
)
def test_bad_grids_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(message)) as error:
        grid_of(tmp_path, text)
    assert str(tmp_path / "grid.yaml") in str(error.value)


# ---- sweeps, with processes that only pretend ---------------------------------------------------------------------

SMALL = """
name: small
base: [quickstart]
settings: {data.limit: 2}
grid:
  method: {d4s: {config: method/d4s}, memit: {config: method/memit}}
  data.shuffle_seed: [0, 1]
"""


def summary_with(accuracy: float) -> dict[str, Any]:
    kinds = {kind: {"success": 1.0, "accuracy": accuracy} for kind in ("efficacy", "generalization", "locality")}
    kinds["locality"]["agreement"] = 0.75
    growth = {"a": 0.1, "b": 0.2}
    return {
        "edits": 2,
        "base": {**kinds, "perplexity": 20.0},
        "final": {**kinds, "perplexity": 22.0},
        "seconds": {"per_edit": 0.5},
        "layers": {name: {"mean_abs_before": 1.0, "mean_abs_after": 1 + grown} for name, grown in growth.items()},
    }


class Pretended:
    """Takes the place of the processes: writes a summary, or fails."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.environments: list[dict[str, str]] = []
        self.failing: dict[str, Callable[[Path], int]] = {}

    @property
    def names(self) -> list[str]:
        return [command[command.index("--run_name") + 1] for command in self.commands]

    def run(self, line: ProcessLine, command: list[str], log: Path, environment: dict[str, str]) -> int:
        self.commands.append(command)
        self.environments.append(environment)
        name, runs = (command[command.index(option) + 1] for option in ("--run_name", "--runs_dir"))
        assert log.parent == Path(runs) / name
        if name in self.failing:
            return self.failing[name](log)
        accuracy = 0.8 if name.endswith("1") else 0.6
        (log.parent / "summary.json").write_text(json.dumps(summary_with(accuracy)))
        log.write_text("Everything is in\n")
        return 0


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pretended:
    monkeypatch.chdir(tmp_path)
    made = Pretended()
    monkeypatch.setattr(ProcessLine, "run", lambda line, *args: made.run(line, *args))
    (tmp_path / "small.yaml").write_text(SMALL)
    return made


POINTS = ["d4s+shuffle_seed=0", "d4s+shuffle_seed=1", "memit+shuffle_seed=0", "memit+shuffle_seed=1"]


def test_settings_that_are_not_finite_are_kept_on_record(
    pretended: Pretended, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clamp = "grid:\n  model.editor.init_args.target.clamp: [4, .inf]\n"
    (tmp_path / "small.yaml").write_text("name: small\nbase: [quickstart]\n" + clamp)
    for _ in range(2):  # and the second time they are what they were
        assert main(["sweep", "--config", "small.yaml"]) == 0
    assert len(pretended.commands) == 2
    assert "done already" in capsys.readouterr().out


def test_every_point_is_a_fit_of_its_own(
    pretended: Pretended, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    assert main(["sweep", "--config", "small.yaml"]) == 0
    assert pretended.names == POINTS
    folder = tmp_path / "runs" / "sweeps" / "small"
    assert pretended.commands[0] == [
        *(sys.executable, "-m", "lit_edit", "fit", "--config", "quickstart", "--config", "method/d4s"),
        *("--data.limit=2", "--data.shuffle_seed=0", "--run_name", POINTS[0], "--runs_dir", str(folder)),
        *("--resume", "auto"),
    ]
    assert pretended.environments[0] == {"WANDB_RUN_GROUP": "small"}
    out = capsys.readouterr().out
    assert "point 3/4: memit+shuffle_seed=0 ... done" in out
    assert (folder / "table.md").read_text() in out


def test_the_table(pretended: Pretended, tmp_path: Path) -> None:
    assert main(["sweep", "--config", "small.yaml", "--only", "0,1,2"]) == 0
    folder = tmp_path / "runs" / "sweeps" / "small"
    saved = json.loads((folder / "table.json").read_text())
    first, *_, last = saved["points"]
    assert (first["index"], first["point"], first["state"], first["method"]) == (0, POINTS[0], "done", "d4s")
    assert (first["efficacy accuracy"], first["agreement"], first["seconds per edit"]) == (0.6, 0.75, 0.5)
    assert first["perplexity change"] == pytest.approx(0.1)
    assert first["largest growth of mean |W|"] == pytest.approx(0.2)
    assert last["state"] == "not run"
    assert last["efficacy accuracy"] is None
    d4s, memit = saved["over_seeds"]
    assert (d4s["method"], d4s["points"], d4s["done"]) == ("d4s", 2, 2)
    assert d4s["efficacy accuracy"] == pytest.approx(0.7)
    assert d4s["efficacy accuracy sd"] == pytest.approx(0.1 * 2**0.5)
    assert (memit["done"], memit["efficacy accuracy"], memit["efficacy accuracy sd"]) == (1, 0.6, None)
    with (folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["efficacy accuracy"] for row in rows] == ["0.6", "0.8", "0.6", ""]
    assert (folder / "over_seeds.csv").is_file()
    text = (folder / "table.md").read_text()
    assert "| not run |" in text
    assert "+10.0%" in text
    assert "0.700 ± 0.141" in text
    assert "mean \\|W\\|" in text


def test_what_is_done_is_not_done_again(pretended: Pretended, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--config", "small.yaml", "--only", "1"]) == 0
    assert main(["sweep", "--config", "small.yaml"]) == 0
    assert pretended.names == [POINTS[1], POINTS[0], *POINTS[2:]]
    assert f"point 2/4: {POINTS[1]} ... done already" in capsys.readouterr().out
    assert main(["sweep", "--config", "small.yaml", "--gather"]) == 0
    assert len(pretended.commands) == 4


def test_a_point_that_fails_does_not_stop_the_others(
    pretended: Pretended, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(log: Path) -> int:
        log.write_text("some\rbar\nlit-edit: error: no such model\nbye\n")
        return 2

    pretended.failing[POINTS[1]] = fail
    assert main(["sweep", "--config", "small.yaml"]) == 1
    assert pretended.names == POINTS
    out = capsys.readouterr().out
    log = tmp_path / "runs" / "sweeps" / "small" / POINTS[1] / "sweep.log"
    assert f"failed, exit status 2: lit-edit: error: no such model (all of it: {log})" in out
    assert "| failed (exit status 2) |" in out
    del pretended.failing[POINTS[1]]
    assert main(["sweep", "--config", "small.yaml"]) == 0
    assert pretended.names == [*POINTS, POINTS[1]]
    assert "failed" not in capsys.readouterr().out


def test_points_that_another_process_works_on_are_left_to_it(
    pretended: Pretended, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "sweeps" / "small"
    (folder / POINTS[0]).mkdir(parents=True)

    def refuse(log: Path) -> int:
        log.write_text(f"lit-edit: error: another process is working in {log.parent}; wait for its end\n")
        return 2

    pretended.failing[POINTS[2]] = refuse  # it was there first by a moment
    with run_lock(folder / POINTS[0]):
        assert main(["sweep", "--config", "small.yaml"]) == 0
    assert pretended.names == POINTS[1:]
    out = capsys.readouterr().out
    assert f"point 1/4: {POINTS[0]} ... being done elsewhere" in out
    assert "2 of 4 points are being done by other processes" in out


def test_ctrl_c_ends_the_sweep_and_says_how_to_go_on(
    pretended: Pretended, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(log: Path) -> int:
        signal.raise_signal(signal.SIGINT)
        return 130

    before = signal.getsignal(signal.SIGINT)
    pretended.failing[POINTS[1]] = interrupt
    assert main(["sweep", "--config", "small.yaml", "--only", "0,1,2"]) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert pretended.names == POINTS[:2]
    said = capsys.readouterr()
    [command] = [line.strip() for line in said.err.splitlines() if "lit-edit sweep" in line]
    assert f"{POINTS[1]} ... interrupted" in said.out
    del pretended.failing[POINTS[1]]
    assert main(shlex.split(command)[1:]) == 0
    assert pretended.names == [*POINTS[:2], *POINTS[1:3]]


def test_a_grid_that_has_changed_behind_its_points_is_refused(
    pretended: Pretended, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "--config", "small.yaml", "--only", "0"]) == 0
    (tmp_path / "small.yaml").write_text(SMALL.replace("data.limit: 2", "data.limit: 3"))
    assert main(["sweep", "--config", "small.yaml"]) == 2
    assert f"the point {POINTS[0]} was made with other settings (data.limit 2, now 3)" in capsys.readouterr().err
    (tmp_path / "small.yaml").write_text(SMALL.replace("[0, 1]", "[0, 2]") + "# more values\n")
    assert main(["sweep", "--config", "small.yaml"]) == 0
    (tmp_path / "small.yaml").write_text(SMALL.replace("limit: 2", "limit: 2, trainer.logger: wandb"))
    assert main(["sweep", "--config", "small.yaml", "--only", "0"]) == 0  # who listens changes no result


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("shuffle_seed: [0, 1]", "shuffle_seed: [0, x]", "grid: data.shuffle_seed: x: data.shuffle_seed: expected"),
        ("data.limit: 2", "data.limit: 0", "base and settings: data.limit must be at least 1"),
        ("data.limit: 2", "data.limits: 2", "base and settings: "),
        ("method/memit}", "method/none}", "grid: method: memit: --config method/none: no such file"),
        ("method/memit}", "method/memit, model.editor.init_args.keys: base}", "grid: method: memit: keys='base' reads"),
        (
            "method/memit}}",
            "method/memit}}\n  model.editor.init_args.keys: [base]",
            "the values method: memit, model.editor.init_args.keys: base, data.shuffle_seed: 0 together: keys='base'",
        ),
    ],
)
def test_points_that_cannot_run_are_named_before_anything_does(
    pretended: Pretended, tmp_path: Path, old: str, new: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert old in SMALL
    (tmp_path / "small.yaml").write_text(SMALL.replace(old, new))
    assert main(["sweep", "--config", "small.yaml"]) == 2
    assert message in capsys.readouterr().err
    assert not pretended.commands
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config", "small.yaml", "--only", "4"], "has the points 0 to 3"),
        (["--config", "small.yaml", "--only", "a"], "expected numbers of points"),
        (["--config", "gone.yaml"], "gone.yaml: no such file"),
        (["--config", "small.yaml", "--gather", "--dry-run"], "not allowed with"),
        (["--config", "quickstart"], "unknown entry 'seed_everything'"),
    ],
)
def test_bad_arguments(pretended: Pretended, args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(["sweep", *args])
    except SystemExit as stop:  # argparse
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_lists_commands_that_parse(
    pretended: Pretended, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "--config", "small.yaml", "--dry-run", "--only", "3"]) == 0
    listed, command = capsys.readouterr().out.splitlines()
    assert listed.split() == ["3", POINTS[3], "not", "run"]
    settings = FitParser().parse(shlex.split(command)[2:])
    assert (settings["run_name"], settings["resume"], settings["data"]["shuffle_seed"]) == (POINTS[3], "auto", 1)
    assert not (tmp_path / "runs").exists()


def test_settings_of_the_command_line_hold_for_all_points(
    pretended: Pretended, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "seeds.yaml").write_text("base: [quickstart]\ngrid:\n  data.shuffle_seed: [0, 1]\n")
    (tmp_path / "facts.csv").write_text("")
    changed = ["--method", "memit", "--limit", "1", "--data", "facts.csv", "--run_name", "other"]
    assert main(["sweep", "--config", "seeds.yaml", "--dry-run", *changed]) == 0
    for line in capsys.readouterr().out.splitlines()[1::2]:
        settings = FitParser().parse(shlex.split(line)[2:])
        assert settings["model"]["editor"]["class_path"] == "lit_edit.editors.MEMIT"
        assert settings["data"]["limit"] == 1
        assert (settings["data"]["source"], settings["data"]["path"]) == ("file", str(tmp_path / "facts.csv"))
        assert settings["runs_dir"] == str(tmp_path / "runs" / "sweeps" / "other")
    assert main(["sweep", "--config", "seeds.yaml", "--array", "slurm", *changed]) == 0
    script = (tmp_path / "runs" / "sweeps" / "other" / "sweep.sbatch").read_text()
    assert "--method=method/memit --run_name other --data.limit=1 --data.source=file" in script
    assert f"--data.path={tmp_path}/facts.csv" in script


def test_a_table_of_damaged_runs(pretended: Pretended, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--config", "small.yaml"]) == 0
    folder = tmp_path / "runs" / "sweeps" / "small"
    (folder / POINTS[0] / "summary.json").write_text("{")
    (folder / POINTS[1] / "sweep.json").write_text("[]")
    stale = json.loads((folder / POINTS[2] / "summary.json").read_text()) | {"stale": "edits were taken out"}
    (folder / POINTS[2] / "summary.json").write_text(json.dumps(stale))
    assert main(["sweep", "--config", "small.yaml", "--gather"]) == 0
    states = [row["state"] for row in json.loads((folder / "table.json").read_text())["points"]]
    assert states[0].startswith("summary.json cannot be read")
    assert states[1:] == ["not run", "edits changed since it was measured", "done"]


# ---- SLURM arrays -------------------------------------------------------------------------------------------------


def run_script(script: Path, folder: Path, *args: str, **variables: str) -> list[list[str]]:
    """Run a batch script with an ``srun`` that only says what it was given."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "srun").write_text('#!/bin/bash\nprintf "%q " "$@"; echo\n')
    (tools / "srun").chmod(0o755)
    environment = {**os.environ, **variables, "PATH": f"{tools}:{os.environ['PATH']}"}
    out = subprocess.run(
        ["/bin/bash", str(script), *args], env=environment, capture_output=True, text=True, check=True
    ).stdout
    return [shlex.split(line) for line in out.splitlines()]


def test_an_array_script_runs_the_points(
    pretended: Pretended, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "--config", "small.yaml", "--array", "slurm"]) == 0
    script = tmp_path / "runs" / "sweeps" / "small" / "sweep.sbatch"
    assert f"sbatch {script}" in capsys.readouterr().out
    text = script.read_text()
    head = text[: text.index("\ncd ")]
    assert "#SBATCH --array=0-3\n" in head
    assert "#SBATCH --signal=SIGUSR1@120\n" in head
    assert {"--requeue", "--open-mode=append"} <= set(re.findall(r"(?m)^#SBATCH (\S+)$", head))
    [words] = run_script(script, tmp_path, SLURM_ARRAY_TASK_ID="2")
    assert words[:3] == ["--cpus-per-task=1", "lit-edit", "sweep"]
    assert main(words[2:]) == 0
    assert pretended.names == [POINTS[2]]


def test_an_array_script_keeps_what_was_set_in_it(pretended: Pretended, tmp_path: Path) -> None:
    assert main(["sweep", "--config", "small.yaml", "--array", "slurm"]) == 0
    script = tmp_path / "runs" / "sweeps" / "small" / "sweep.sbatch"
    script.write_text(script.read_text().replace("0-3\n", "0-3%2\n").replace("--time=04", "--time=12"))
    (tmp_path / "small.yaml").write_text(SMALL.replace("[0, 1]", "[0, 1, 2]"))
    assert main(["sweep", "--config", "small.yaml", "--array", "slurm"]) == 0
    assert "#SBATCH --array=0-5%2\n" in script.read_text()
    assert "#SBATCH --time=12:00:00" in script.read_text()


# ---- processes ----------------------------------------------------------------------------------------------------

LISTENING = """
import signal, sys, time
for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
    signal.signal(getattr(signal, name), lambda number, frame: print(signal.Signals(number).name, flush=True))
print("ready", flush=True)
while time.sleep(0.02) is None and not open(sys.argv[1]).read().count("SIG") >= int(sys.argv[2]): pass
"""


@pytest.mark.parametrize("sent", [("SIGINT",), ("SIGTERM",), ("SIGUSR1",), ("SIGUSR1", "SIGTERM")])
def test_signals_are_passed_on_to_the_process_at_work(tmp_path: Path, sent: tuple[str, ...]) -> None:
    log = tmp_path / "log"
    log.touch()

    def send() -> None:
        for count, name in enumerate(sent):
            while log.read_text().count("\n") <= count:
                pass
            os.kill(os.getpid(), getattr(signal, name))

    with ProcessLine() as line:
        thread = threading.Thread(target=send)
        thread.start()
        status = line.run([sys.executable, "-c", LISTENING, str(log), str(len(sent))], log, {})
        thread.join()
    assert status == 0
    assert line.stopped == getattr(signal, sent[0])
    assert log.read_text().split() == ["ready", *sent]


def test_a_second_ctrl_c_kills(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()

    def send() -> None:
        for count in range(2):
            while log.read_text().count("\n") <= count:
                pass
            os.kill(os.getpid(), signal.SIGINT)

    with ProcessLine() as line:
        thread = threading.Thread(target=send)
        thread.start()
        assert line.run([sys.executable, "-c", LISTENING, str(log), "9"], log, {}) == -signal.SIGKILL
        thread.join()


def test_in_another_thread_signals_are_left_alone() -> None:
    found = []
    before = signal.getsignal(signal.SIGINT)

    def work() -> None:
        with ProcessLine():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


# ---- what ships, and the real thing -------------------------------------------------------------------------------


def test_the_grid_that_ships_parses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_sweep(["--config", "sweep/editors", "--dry-run", "--runs_dir", str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 * 16
    assert list(tmp_path.iterdir()) == []


def test_all_grids_that_ship_are_tested() -> None:
    assert {path.stem for path in (config_root() / "sweep").iterdir()} == {"editors", "wandb"}


def test_the_wandb_sweep_that_ships_parses() -> None:
    definition = yaml.safe_load(Path(find_config("sweep/wandb")).read_text())
    program, command, *words = definition["command"]
    assert (program, command, words.pop()) == ("lit-edit", "fit", "${args}")
    assert {"program", "command", "method", "metric", "parameters"} <= set(definition)
    parser = FitParser()
    columns = [parameter.get("values") or [parameter["value"]] for parameter in definition["parameters"].values()]
    for row in range(max(map(len, columns))):
        values = [column[min(row, len(column) - 1)] for column in columns]
        # As wandb's agent writes its ${args}.
        arguments = [f"--{name}={value}" for name, value in zip(definition["parameters"], values, strict=True)]
        settings = parser.parse([*words, *arguments])
        parser.make()
        assert settings["model"]["editor"]["class_path"] == values[3]
        assert settings["model"]["editor"]["init_args"]["layers"] == values[4]
        assert settings["trainer"]["logger"][1]["class_path"].endswith("RunWandbLogger")


def test_a_sweep_of_two_points(
    tmp_path: Path,
    tiny_folder: Path,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    fixed = dict(word.removeprefix("--").split("=") for word in FAST)
    fixed |= {"model.language_model.name": str(tiny_folder), "data.limit": 2, "trainer.accelerator": "cpu"}
    grid = {
        "name": "tiny",
        "base": ["quickstart"],
        "settings": fixed,
        "grid": {"editor": {"d4s": {"config": "method/d4s"}, "memit": {"config": "method/memit"}}},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(grid))
    assert main(["sweep", "--config", "tiny.yaml"]) == 0, capsys.readouterr().out
    folder = tmp_path / "runs" / "sweeps" / "tiny"
    table = json.loads((folder / "table.json").read_text())["points"]
    assert [(row["editor"], row["state"], row["edits"]) for row in table] == [("d4s", "done", 2), ("memit", "done", 2)]
    assert all(0 <= row["agreement"] <= 1 and row["seconds per edit"] > 0 for row in table)
    for row in table:
        summary = json.loads((folder / row["point"] / "summary.json").read_text())
        assert row["efficacy accuracy"] == summary["final"]["efficacy"]["accuracy"]
        assert "Everything is in" in (folder / row["point"] / "sweep.log").read_text()
    capsys.readouterr()
    assert main(["sweep", "--config", "tiny.yaml"]) == 0
    assert capsys.readouterr().out.count("done already") == 2
