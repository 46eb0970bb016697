"""``lit-edit study beliefs``: a micro model is edited, measured, taken back; what is done is not done again."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import matplotlib.image
import pytest
import torch
import yaml

from lit_edit.cli.main import main
from lit_edit.errors import ArgumentError
from lit_edit.models import ModelAdapter
from lit_edit.models.language_model import LanguageModel
from lit_edit.studies.beliefs.agent import Agent
from lit_edit.studies.beliefs.bench import Bench, make_editor
from lit_edit.studies.beliefs.cases import CaseFile
from lit_edit.studies.beliefs.coherence import draw_cases
from lit_edit.studies.beliefs.corpus import CorpusConfig, write_sentences
from lit_edit.studies.beliefs.decoder import TrainingConfig
from lit_edit.studies.beliefs.report import mean_row
from lit_edit.studies.beliefs.testbed import Testbed
from lit_edit.studies.beliefs.world import WorldConfig, generate_world

D4S = {"class_path": "lit_edit.editors.D4S", "init_args": {"layers": [6], "target": {"steps": 2}}}
FT = {"class_path": "lit_edit.editors.FT", "init_args": {"layers": [15], "steps": 2}}


@pytest.fixture
def study(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command of a study of a micro model that is trained for two steps."""
    monkeypatch.chdir(tmp_path)
    for name, editor in (("own", D4S), ("tuned", FT)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"model": {"editor": editor}}))
    return [
        *("study", "beliefs", "--preset", "micro", "--subjects", "6", "--max-steps", "2", "--edits", "2"),
        *("--probes", "2", "--method", "own.yaml", "tuned.yaml"),
    ]


@pytest.mark.slow
def test_a_study_from_its_world_to_its_table(
    study: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(study) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "runs" / "studies" / "beliefs"
    text = (folder / "beliefs.md").read_text()
    assert text in out
    assert "trained in" in out
    report = json.loads((folder / "beliefs.json").read_text())
    assert [row["editor"] for row in report["rows"]] == ["before", "unedited", "own", "tuned"]
    assert {row["edits"] for row in report["rows"]} == {2}
    before, unedited, own, _ = report["rows"]
    assert own["p/requested"] != unedited["p/requested"] == before["p/requested"]
    assert before["gap/edited/now"] == before["gap/edited/original"]
    with (folder / "beliefs.csv").open() as file:
        assert float(list(csv.DictReader(file))[2]["gap/other"]) == own["gap/other"]
    assert matplotlib.image.imread(folder / "beliefs.png").shape[2] == 4

    # again, with one edit more and a line that was cut: only what is missing is done
    path = folder / "cases" / "own.jsonl"
    kept = path.read_text().splitlines()
    assert json.loads(kept[0])["settings"]["layers"] == [0]  # 6 of 30 layers is 0 of 2
    path.write_text("\n".join(kept[:2]) + "\n" + kept[2][:20])
    study[study.index("--edits") + 1] = "3"
    study.remove("tuned.yaml")
    assert main(study) == 0
    assert "from the cache" in capsys.readouterr().out
    assert path.read_text().splitlines()[:3] == kept  # the same numbers
    assert len(path.read_text().splitlines()) == 4
    assert main([*study, "--gather"]) == 0

    assert main([*study, "--probes", "1"]) == 2
    assert "was begun with other settings (probes " in capsys.readouterr().err


def test_an_edit_is_taken_back(study: list[str], tmp_path: Path) -> None:
    training = TrainingConfig(preset="micro", max_steps=1)
    testbed = Testbed(generate_world(WorldConfig(subjects=6)), CorpusConfig(), training)
    trained = testbed.train()
    model, tokenizer = LanguageModel(str(trained.folder)).load()
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    agent = Agent.of(testbed.world, write_sentences(testbed.world, testbed.corpus))
    cases = draw_cases(testbed.world, agent, 2, probes=1)
    bench = Bench(make_editor("own.yaml", trained.folder, 2, None), ModelAdapter(model), tokenizer, trained.folder)
    first = bench.measure(cases[0], 0, agent)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    bench.measure(cases[1], 1, agent)
    assert bench.measure(cases[0], 0, agent) == first  # nothing is left of the one between


def test_means_are_over_cases_and_objects() -> None:
    row = mean_row("x", [{"gap/edited/now": 0.2, "logic/or": 0.1}, {"gap/edited/now": 0.4, "gap/other/now": 0.1}])
    assert row["gap/edited"] == pytest.approx(0.3)
    assert row["gap/now"] == pytest.approx(0.2)  # of the two kinds
    assert row["gap/edited/now sd"] == pytest.approx(0.02**0.5)
    assert (row["logic/or"], row["gap/requested"], row["accuracy/edited"]) == (0.1, None, None)


def test_errors_are_one_line(study: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.tsv").write_text("Ada\tspeaks\n")
    for words, said in (
        (["--method", "method/d5s"], "method/d5s: no such file"),
        (["--method", "own.yaml", "./own.yaml"], "the name 'own' is taken"),
        (["--edits", "1000"], "--limit must be from 1 to"),
        (["--triples", "bad.tsv"], "--subjects is of the generated world"),
        (["--facts", "10"], "--facts is of --data"),
        (["--layers", "2"], "--layers 2: the decoder has layers 0 to 1"),
        (["--method", "method/grace", "--layers", "0", "1"], "method/grace edits one layer, got 0 1"),
        (["--gather"], "there is nothing of this study in"),
        (["--max-minutes", "0"], "--max-minutes must be positive"),
    ):
        assert main([*study, *words]) == 2, words
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_triples_that_are_none(study: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.tsv").write_text("Ada\tspeaks\n")
    at = study.index("--subjects")
    assert main([*study[:at], *study[at + 2 :], "--triples", "bad.tsv"]) == 2
    assert "bad.tsv:1: expected subject, relation and object" in capsys.readouterr().err


def test_a_method_of_one_layer_is_put_at_its_relative_depth(study: list[str], tmp_path: Path) -> None:
    editor = {"class_path": "lit_edit.editors.GRACE", "init_args": {"layer": 25}}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump({"model": {"editor": editor}}))
    assert make_editor("one.yaml", tmp_path, 4, None).layer == 3  # type: ignore[attr-defined]
    assert make_editor("one.yaml", tmp_path, 4, [1]).layer == 1  # type: ignore[attr-defined]


def test_damaged_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs" / "studies" / "beliefs"
    (folder / "cases").mkdir(parents=True)
    gather = ["study", "beliefs", "--gather", "--runs_dir", str(tmp_path / "runs")]
    (folder / "settings.json").write_text("{}")
    assert main(gather) == 2
    assert "settings.json is damaged (fields are missing)" in capsys.readouterr().err
    told = {"testbed": {"training": {"preset": "micro"}}, "facts": 1, "edits": 1}
    (folder / "settings.json").write_text(json.dumps(told | {"trained": {"accuracy": 1.0, "steps": 2}}))
    (folder / "cases" / "x.jsonl").write_text('{"settings": {}}\n{}\n')
    assert main(gather) == 2
    assert "x.jsonl:2: damaged (KeyError: 'case')" in capsys.readouterr().err
    rows = ['{"settings": {}}', *(json.dumps({"case": case, "logic/or": 0.1}) for case in (0, 0, 1))]
    (folder / "cases" / "x.jsonl").write_text("\n".join(rows) + "\n")
    assert main(gather) == 0
    assert json.loads((folder / "beliefs.json").read_text())["rows"][0]["edits"] == 1  # each once, of so many asked for


def test_a_case_file_refuses_other_settings(tmp_path: Path) -> None:
    file = CaseFile(tmp_path / "cases" / "x.jsonl", {"lr": 1})
    file.add(3, {"a": float("nan")})
    assert CaseFile(file.path, {"lr": 1}).rows == {3: {"case": 3, "a": None}}
    with pytest.raises(ArgumentError, match="was begun with other settings"):
        CaseFile(file.path, {"lr": 2})
