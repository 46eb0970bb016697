"""``lit-edit study batch-size``: its runs, table and figure; and that D4S on one layer has no batch."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lit_edit import D4S, MEMIT, EditStream, LanguageModel, TargetSettings
from lit_edit.cli.main import main
from lit_edit.console.configs import find_config
from lit_edit.data.datamodule import StreamLoader
from lit_edit.editors.closed_form.engine import ClosedFormEditor
from lit_edit.studies.batch_size.report import draw_batches, lines_of
from lit_edit.studies.batch_size.run import with_batches
from lit_edit.sweeps.grids import read_grid
from lit_edit.testing import tiny_model, tiny_requests, tiny_tokenizer
from tests.streams import FixedStatistics
from tests.sweeps.test_sweep import Pretended, pretended  # noqa: F401 - a fixture

SMALL = """
name: small
base: [counterfact]
settings: {data.limit: 4}
grid:
  editor: {rome: {config: method/rome}, d4s: {config: method/d4s}}
  data.batch_size: {1: 1, 2: 2, 4: 4, all: 1000000}
"""


def points_of(edits: int) -> list[str]:
    return [point.name for point in with_batches(read_grid(Path(find_config("studies/batch_size"))), edits)]


def test_only_runs_that_can_be_and_that_differ() -> None:
    of_64 = points_of(64)
    assert [name for name in of_64 if name.startswith("rome")] == ["rome+1"]
    assert [name for name in of_64 if name.startswith("d4s+")] == ["d4s+1", "d4s+4", "d4s+16", "d4s+all"]
    assert {name.split("+")[0] for name in of_64} == {"rome", "memit", "emmet", "alphaedit", "d4s", "d4s-one-layer"}
    batches = [name.split("+")[1] for name in points_of(1000) if name.startswith("emmet")]
    assert batches == ["1", "4", "16", "64", "256", "all"]


@pytest.fixture
def study(pretended: Pretended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:  # noqa: F811
    """The command of a small study whose processes are pretended, and whose settings are not looked into."""
    monkeypatch.setattr("lit_edit.sweeps.points.parse_points", lambda grid, points: ({p.name: {} for p in points}, {}))
    (tmp_path / "small_study.yaml").write_text(SMALL)
    (tmp_path / "data.json").write_text(json.dumps([request.as_dict() for request in tiny_requests()]))
    return ["study", "batch-size", "--config", "small_study.yaml", "--data", "data.json"]


def test_a_study_from_its_runs_to_its_table(
    study: list[str],
    pretended: Pretended,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretended.failing["d4s+2"] = lambda log: log.write_text("lit-edit: error: not today\n") and 2
    assert main(study) == 1
    assert pretended.names == ["rome+1", "d4s+1", "d4s+2", "d4s+all"]
    assert "--data.batch_size=1000000" in pretended.commands[-1]
    assert f"--data.path={tmp_path / 'data.json'}" in pretended.commands[0]
    folder = tmp_path / "runs" / "studies" / "small"
    with (folder / "batch_size.csv").open() as file:
        rows = {row["point"]: row for row in csv.DictReader(file)}
    assert rows["d4s+1"]["efficacy accuracy"] == "0.8"
    assert (rows["d4s+all"]["batch"], rows["d4s+all"]["state"]) == ("all", "done")
    assert rows["d4s+2"]["state"] == "failed (exit status 2)"
    text = (folder / "batch_size.md").read_text()
    assert "d4s, 2: lit-edit: error: not today" in text
    assert text in capsys.readouterr().out
    assert (folder / "batch_size.png").stat().st_size > 5000

    # again: what is done is kept; the same figure is not drawn once more here
    monkeypatch.setattr("lit_edit.studies.batch_size.report.draw_batches", lambda rows: Figure((1, 1)))
    pretended.failing.clear()
    pretended.commands.clear()
    rows = (folder / "batch_size.csv").read_text().count("\n")
    assert main([*study, "--only", "d4s"]) == 0
    assert pretended.names == ["d4s+2"]
    assert (folder / "batch_size.csv").read_text().count("\n") == rows  # beside what was done before
    assert main([*study, "--gather"]) == 0
    assert pretended.names == ["d4s+2"]


def test_the_runs_that_ship_are_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.json").write_text(json.dumps([request.as_dict() for request in tiny_requests()]))
    words = ["--data", str(tmp_path / "data.json"), "--runs_dir", str(tmp_path / "runs"), "--edits", "6", "--dry-run"]
    assert main(["study", "batch-size", *words, "--only", "d4s-one-layer"]) == 0
    commands = [line for line in capsys.readouterr().out.splitlines() if line.startswith("   lit-edit fit")]
    assert len(commands) == 3  # 1, 4, all
    assert all("--data.limit=6" in line and "layers=[8]" in line for line in commands)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "none.json"], "--data none.json: no such file"),
        (["--edits", "7"], "--limit 7: data.json has only 6"),
        (["--only", "ike"], "--method ike: there is no such editor"),
        (["--config", "compare"], "this study has the axes editor, data.batch_size; got editor"),
        (["--gather"], "nothing of this study is done yet"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, study: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*study, *words]) == 2
    assert message in capsys.readouterr().err


def test_a_line_per_editor_over_the_edits_in_a_step() -> None:
    made = {"edits": 8, "score": 0.5, "perplexity change": 0.25}
    names = ["efficacy success", "efficacy accuracy", "generalization success", "locality success"]
    made |= dict.fromkeys([*names, "largest growth of mean |W|", "seconds per edit"], 1.0)
    rows = [{"editor": editor, "batch": batch, **made} for editor in ("memit", "d4s") for batch in ("all", "1", "4")]
    rows[1] |= {"edits": None}  # not run
    assert lines_of(rows, "perplexity change") == {
        "memit": [(4, 1.25), (8, 1.25)],
        "d4s": [(1, 1.25), (4, 1.25), (8, 1.25)],
    }
    figure = draw_batches(rows)
    assert len(figure.axes) == 8
    for axis in figure.axes:
        lines = {line.get_gid(): list(line.get_xdata()) for line in axis.get_lines()}
        assert lines == {"memit": [4, 8], "d4s": [1, 4, 8]}
        assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "4", "8"]


# ---- D4S on one layer -----------------------------------------------------------------------------------------------


def weight_after(kind: type[ClosedFormEditor], layers: list[int], batch_size: int) -> Tensor:
    """The last edited weight after six edits, handed out by the stream's own loader."""
    editor = kind(layers=layers, covariance_weight=2.0, contexts="plain", target=TargetSettings(steps=3))
    model = tiny_model("gpt2", torch.float64, initializer_range=0.3)
    stream = EditStream(LanguageModel.of(model, tiny_tokenizer()), editor, FixedStatistics(), on_conflict="average")
    session = stream.open()
    loader = StreamLoader(tiny_requests(), batch_size, window=6)
    for batch in loader:
        session.apply(session.propose(batch.requests, batch.window))
    assert stream.ledger.made == 6
    return stream.adapter.own_weight(layers[-1]).detach().clone()


def test_d4s_on_one_layer_does_not_depend_on_the_batch() -> None:
    one = weight_after(D4S, [1], 1)
    for batch_size in (2, 3, 1_000_000):
        torch.testing.assert_close(weight_after(D4S, [1], batch_size), one, rtol=0.0, atol=1e-9)


def test_memit_and_several_layers_do_depend_on_it() -> None:
    """Else the test above would say nothing."""
    for kind, layers in ((MEMIT, [1]), (D4S, [1, 2])):
        assert (weight_after(kind, layers, 1) - weight_after(kind, layers, 6)).abs().max() > 1e-5
