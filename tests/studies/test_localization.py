"""``lit-edit study tracing``: rewrite scores and new objects by hand, edits made alone, the whole study."""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
import torch
import yaml

from lit_edit.cli.main import main
from lit_edit.data.request import DataError
from lit_edit.editors.closed_form.d4s import D4S
from lit_edit.editors.closed_form.rome import ROME
from lit_edit.models import ModelAdapter
from lit_edit.stats.second_moment import KeyStatistics, weights_hash
from lit_edit.studies.alone import SingleEdits
from lit_edit.studies.localization.layer_edits import LayerEdit, edit_alone, probability, requests_of, rewrite_score
from lit_edit.studies.localization.run import verdict
from lit_edit.studies.tracing import FactTrace, fraction_restored
from lit_edit.studies.tracing.regression import LocalizationFit, regress
from lit_edit.targets.optimize import TargetSettings
from lit_edit.testing import tiny_model, tiny_requests, tiny_tokenizer

FACTS = [
    {"prompt": "Italy is in", "subject": "Italy", "attribute": "Europe", "relation_id": "P30"},
    {"prompt": "Oslo is located in", "subject": "Oslo", "attribute": "Europe", "relation_id": "P30"},
    {"prompt": "Kyoto is in", "subject": "Kyoto", "attribute": "Asia", "relation_id": "P30"},
    {"prompt": "Emma is by", "subject": "Emma", "attribute": "Austen", "relation_id": "P50"},
    {"prompt": "Chopin plays", "subject": "Chopin", "attribute": "piano"},
    {"prompt": "Nokia plays", "subject": "Nokia", "attribute": "chess"},
]


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(FACTS))
    return path


def test_the_rewrite_score_by_hand() -> None:
    assert rewrite_score(0.5, 0.75) == 0.5
    assert rewrite_score(0.5, 0.25) == 0.0
    assert LayerEdit("0", 1, 0.1, 0.0, None).score is None


def test_new_objects_are_of_the_same_relation(facts: Path) -> None:
    requests = requests_of(facts, ["2", "0", "1", "3", "5"], seed=0)
    assert [(r.id, r.target_new, r.target_true) for r in requests] == [
        ("2", "Europe", "Asia"),
        ("0", "Asia", "Europe"),
        ("1", "Asia", "Europe"),
        ("5", "piano", "chess"),  # of the same words; and fact 3 has nobody to take an object from
    ]
    assert requests[2].prompt == "{} is located in"
    with pytest.raises(DataError, match="has no fact '9'"):
        requests_of(facts, ["9"], seed=0)
    with pytest.raises(DataError, match="no traced fact has another attribute"):
        requests_of(facts, ["3"], seed=0)


def test_records_of_edits_have_their_own_new_objects(tmp_path: Path) -> None:
    path = tmp_path / "edits.json"
    path.write_text(json.dumps([request.as_dict() for request in tiny_requests()[:2]]))
    assert [r.target_new for r in requests_of(path, ["1", "0"], seed=0)] == ["Greek", "Vienna"]


@pytest.mark.parametrize("method", [D4S, ROME])
def test_each_edit_is_made_as_if_it_were_the_only_one(method: type[D4S] | type[ROME], tmp_path: Path) -> None:
    statistics, requests = KeyStatistics(cache=str(tmp_path)), tiny_requests()[:3]

    def alone(chosen: list[int]) -> dict[str, float | None]:
        adapter = ModelAdapter(tiny_model())
        before = {name: value.clone() for name, value in adapter.model.state_dict().items()}
        anchor = "mlp" if method is ROME else "state"
        editor = method([1], contexts="plain", target=TargetSettings(steps=2, anchor=anchor))
        edits = SingleEdits(editor, adapter, tiny_tokenizer(), statistics)
        values = {request.id: value for request, value in edit_alone(edits, [requests[i] for i in chosen])}
        assert all(torch.equal(value, before[name]) for name, value in adapter.model.state_dict().items())
        return values

    together, single = alone([0, 1, 2]), alone([2])
    assert single["2"] is not None
    assert together["2"] == pytest.approx(single["2"], rel=1e-4)  # its target is fitted beside others
    base = probability(ModelAdapter(tiny_model()), tiny_tokenizer(), requests[2])
    assert single["2"] > base


def test_the_whole_study(
    facts: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    trace = tmp_path / "trace"
    trace.mkdir()
    traces = [
        FactTrace(
            str(number), "a b", ("a", " b"), (0, 1), "c", 0.9, 0.1,
            {"mlp": tuple((0.1 + 0.1 * ((number + layer) % 4), 0.1) for layer in range(4))},
        )
        for number in (0, 1, 2, 5)
    ]  # fmt: skip
    (trace / "facts.jsonl").write_text("".join(json.dumps(vars(t)) + "\n" for t in traces))
    told = {
        "model": str(tiny_folder),
        "weights": weights_hash(tiny_model()),
        "data": hashlib.sha256(facts.read_bytes()).hexdigest()[:16],
    }
    (trace / "settings.json").write_text(json.dumps(told))
    editor = {
        "class_path": "lit_edit.editors.D4S",
        "init_args": {"contexts": "plain", "covariance_weight": 1, "target": {"steps": 8}},
    }
    statistics = {"tokens": 0, "cache": str(tmp_path / "stats")}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"model": {"editor": editor, "statistics": statistics}}))
    command = ["study", "tracing", "--trace", "trace", "--data", str(facts), "--method", "tiny.yaml", "--out", "out"]
    assert main([*command, "--layers", "0", "2"]) == 0
    out = Path("out")
    with (out / "edits.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["layer"], row["fact"]) for row in rows] == [(layer, fact) for layer in "02" for fact in "0125"]
    for row in rows:
        of_fact = next(t for t in traces if t.id == row["fact"])
        assert float(row["effect"]) == fraction_restored(of_fact, "mlp")[int(row["layer"])]
        assert float(row["score"]) == rewrite_score(float(row["before"]), float(row["after"]))
    fit = regress(*([float(row[name]) for row in rows] for name in ("score", "layer", "effect")))  # type: ignore[arg-type]
    assert json.loads((out / "tracing.json").read_text())["both"] == pytest.approx(fit.both)
    assert matplotlib.image.imread(out / "tracing.png").shape[2] == 4
    shown = capsys.readouterr().out
    assert verdict(fit) in shown

    kept = (out / "results.jsonl").read_bytes()
    (out / "results.jsonl").write_bytes(kept[:-5])
    assert main([*command, "--layers", "0", "2"]) == 0
    assert (out / "results.jsonl").read_bytes() == kept
    assert main([*command, "--kind", "attn"]) == 2
    assert "no effects of --kind attn" in capsys.readouterr().err


@pytest.mark.parametrize(("both", "p", "says"), [(0.52, 0.001, "Trust measured"), (0.7, 0.001, "says something"),
                                                 (0.7, 0.2, "Trust measured")])  # fmt: skip
def test_the_verdict(both: float, p: float, says: str) -> None:
    assert says in verdict(LocalizationFit(0.5, 0.1, both, 9.0, p))


def test_where_nothing_can_be_regressed_the_edits_are_reported(
    facts: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    edits = [LayerEdit(str(fact), layer, 0.1 * fact, 0.0, 1.0) for layer in (0, 2) for fact in range(3)]
    traces = [FactTrace("0", "a b", ("a", " b"), (0, 1), "c", 0.9, 0.1, {"mlp": ((0.1, 0.1),)})]
    told = {"model": "m", "data": hashlib.sha256(facts.read_bytes()).hexdigest()[:16]}
    monkeypatch.setattr("lit_edit.studies.localization.run._read_trace", lambda *args: (told, traces))
    monkeypatch.setattr("lit_edit.studies.localization.run._edit", lambda *args: edits)
    command = ["study", "tracing", "--trace", "x", "--data", str(facts), "--out", "out"]
    assert main(command) == 0
    assert "There is nothing to regress: " in capsys.readouterr().out
    assert (tmp_path / "out" / "edits.csv").read_text().count("\n") == 7
    assert len(json.loads((tmp_path / "out" / "tracing.json").read_text())["layers"]) == 2
    monkeypatch.setattr(
        "lit_edit.studies.localization.run._edit", lambda *args: [replace(e, after=None) for e in edits]
    )
    assert main(command) == 2
    assert "none of the 6 edits could be made" in capsys.readouterr().err


def test_a_folder_without_a_tracing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "tracing", "--trace", str(tmp_path)]) == 2
    assert "no tracing there" in capsys.readouterr().err
