"""``lit-edit study mqd``: what it runs, keeps and refuses, its tables and figure; the processes are pretended."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import matplotlib.image
import pytest
import yaml

from lit_edit.cli.main import main
from lit_edit.console.children import ProcessLine
from lit_edit.data.events import read_events
from lit_edit.data.mqd import KINDS, build_mqd
from lit_edit.data.sources import load_requests
from lit_edit.metrics.diversity import describe_targets
from lit_edit.models import ModelAdapter
from lit_edit.testing import tiny_model, tiny_tokenizer
from tests.sweeps.test_sweep import Pretended


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pretended:
    """Processes that only write a summary, or fail."""
    monkeypatch.chdir(tmp_path)
    made = Pretended()

    def run(line: ProcessLine, command: list[str], log: Path, environment: dict[str, str]) -> int:
        status = made.run(line, command, log, environment)
        if status == 0:
            path = log.parent / "summary.json"
            summary = json.loads(path.read_text())
            path.write_text(json.dumps(summary | {"immediate": summary["final"]}))
        return status

    monkeypatch.setattr(ProcessLine, "run", run)
    return made


@pytest.fixture
def study(pretended: Pretended, tiny_folder: Path, tmp_path: Path) -> list[str]:
    """The command of a study of the tiny model."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"model": {"editor": {"init_args": {"layers": [1, 2]}}}}))
    return ["study", "mqd", "--edits", "2", "--model", str(tiny_folder), "--method", "tiny.yaml"]


def test_a_study_from_its_data_to_its_table(
    study: list[str], pretended: Pretended, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretended.failing["choice"] = lambda log: log.write_text("lit-edit: error: not today\n") and 2
    assert main(study) == 1
    folder = tmp_path / "runs" / "studies" / "mqd"
    made = build_mqd(read_events())
    for kind, command in zip(KINDS, pretended.commands, strict=True):
        data = folder / "data" / f"mqd_{kind}.json"
        assert load_requests("facts", str(data))[0] == made[kind]
        assert f"--data.path={data}" in command
        assert {"--data.limit=2", "--data.source=facts", "tiny.yaml"} <= set(command)
        assert command[command.index("--run_name") + 1 :] == [kind, "--runs_dir", str(folder), "--resume", "auto"]
    report = json.loads((folder / "mqd.json").read_text())
    assert [row["state"] for row in report["runs"]] == ["done", "failed (exit status 2)", "done"]
    assert report["runs"][0]["accuracy"] == 0.6
    rows = {(row["of"], row["kind"]): row for row in report["targets"]}
    assert list(rows) == [(of, kind) for of in ("all", "edited") for kind in KINDS]
    assert rows["all", "choice"]["entropy"] == 2.0
    assert [rows["edited", kind]["edits"] for kind in KINDS] == [2, 2, 2]
    expected = describe_targets(ModelAdapter(tiny_model()), tiny_tokenizer(), made["direct"][:2])
    assert rows["edited", "direct"]["perplexity"] == pytest.approx(expected.perplexity)
    with (folder / "mqd.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["target perplexity"]) for line in lines] == [rows["edited", k]["perplexity"] for k in KINDS]
    text = (folder / "mqd.md").read_text()
    assert "choice failed: lit-edit: error: not today" in text
    assert text in capsys.readouterr().out
    assert matplotlib.image.imread(folder / "mqd.png").shape[2] == 4

    # again: what is done is kept, what failed is tried once more, and nothing is measured a second time
    pretended.failing.clear()
    pretended.commands.clear()
    assert main(study) == 0
    assert pretended.names == ["choice"]
    assert "measuring" not in capsys.readouterr().out
    assert main([*study, "--gather"]) == 0
    assert pretended.names == ["choice"]

    # other data or other edits belong to another study
    capsys.readouterr()
    assert main([*study, "--seed", "1"]) == 2
    assert "mqd_direct.json was made of other events or with another seed" in capsys.readouterr().err
    assert main([*study, "--edits", "3"]) == 2
    assert "was made with other settings (data.limit 2, now 3)" in capsys.readouterr().err


def test_what_would_be_run_is_listed(pretended: Pretended, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "mqd", "--dry-run", "--name", "other", "--runs_dir", "elsewhere"]) == 0
    out = capsys.readouterr().out
    assert [f"{number}  {kind}  not run" in out for number, kind in enumerate(KINDS)] == [True] * 3
    assert f"--runs_dir {tmp_path}/elsewhere/studies/other" in out
    assert "--config method/d4s" in out
    assert not pretended.commands
    assert not list(tmp_path.iterdir())


def test_errors_are_one_line(pretended: Pretended, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = {"base": ["counterfact"], "grid": {"kind": {"direct": {"data.limit": 1}}}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(grid))
    for words, said in (
        ([], "lit-edit study: name a study: "),
        (["mqdd"], "there is no study 'mqdd'; did you mean mqd?"),
        (["mqd", "--edits", "1000"], "--limit must be from 1 to 96"),
        (["mqd", "--gather"], "nothing of this study is done yet"),
        (["mqd", "--method", "method/d5s", "--dry-run"], "method/d5s: no such file"),
        (["mqd", "--config", "own.yaml"], "with the values direct, choice, truth; got kind with kind: direct"),
    ):
        assert main(["study", *words]) == 2, words
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert not pretended.commands
