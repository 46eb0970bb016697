"""``lit-edit mine-hard``: what single edits do to a model, which of them are hard, and going on after a cut."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_edit import EditStream, KeyStatistics, LanguageModel, TargetSettings
from lit_edit.cli.main import main
from lit_edit.data.request import EditRequest
from lit_edit.data.sources import load_requests
from lit_edit.editors import D4S, GRACE, ROME
from lit_edit.errors import ArgumentError, UserError
from lit_edit.ledger.edit_ledger import EditRefusedError
from lit_edit.metrics.evaluation import evaluate_edits, measure_perplexity
from lit_edit.runs.results import ResultsFolder
from lit_edit.studies.hard_facts.mining import Miner, SingleEdit, as_records, choose_hard
from lit_edit.testing import tiny_model, tiny_requests, tiny_tokenizer
from tests.streams import FixedStatistics

TEXTS = ["A plain sentence of some words.", "Another one follows it here."]
EDITORS = {
    "rome": lambda: ROME(layers=[1], contexts="plain", target=TargetSettings(steps=4, anchor="mlp")),
    "d4s": lambda: D4S(layers=[1, 2], contexts="plain", covariance_weight=2.0, target=TargetSettings(steps=4)),
}


def open_stream(editor: Any) -> EditStream:
    stream = EditStream(LanguageModel.of(tiny_model(), tiny_tokenizer()), editor, FixedStatistics())
    stream.open()
    return stream


def miner_of(stream: EditStream) -> Miner:
    return Miner(stream.session, stream.tokenizer, TEXTS)


@pytest.mark.parametrize("name", EDITORS)
def test_a_view_shows_what_the_edit_alone_would_do(name: str) -> None:
    """Each edit is really made, on a model of its own; the miner says the same, in any order, and writes nothing."""
    requests = tiny_requests()[:2]
    mined = open_stream(EDITORS[name]())
    before = {key: value.clone() for key, value in mined.model.state_dict().items()}
    miner = miner_of(mined)
    found = {request.id: miner.try_edit(request) for request in reversed(requests)}
    for request in requests:
        stream = open_stream(EDITORS[name]())
        base = measure_perplexity(stream.adapter, stream.tokenizer, TEXTS, leading=False)
        [unedited] = evaluate_edits(stream.adapter, stream.tokenizer, [request])[0].efficacy
        stream.session.apply(stream.session.propose([request], [request]))
        after = measure_perplexity(stream.adapter, stream.tokenizer, TEXTS, leading=False)
        [probe] = evaluate_edits(stream.adapter, stream.tokenizer, [request])[0].efficacy
        norms = stream.ledger.layer_norms().values()
        row = found[request.id]
        assert row.perplexity == pytest.approx(after, rel=1e-5)
        assert row.ratio == pytest.approx(after["mean"] / base["mean"], rel=1e-5)
        assert row.ratio != 1.0
        assert row.probability == pytest.approx(math.exp(-probe.preferred), rel=1e-4)
        assert row.probability_before == pytest.approx(math.exp(-unedited.preferred), rel=1e-4)
        assert row.growth == pytest.approx(max(n["mean_abs_after"] / n["mean_abs_before"] for n in norms) - 1, rel=1e-4)
    assert mined.ledger.made == 0
    assert all(torch.equal(value, before[key]) for key, value in mined.model.state_dict().items())


def test_an_editor_with_a_memory_leaves_ordinary_text_alone() -> None:
    row = miner_of(open_stream(GRACE(layer=2))).try_edit(tiny_requests()[0])
    assert (row.ratio, row.growth) == (pytest.approx(1.0, rel=1e-6), 0.0)
    assert row.probability > row.probability_before


def test_an_edit_that_must_not_be_written_is_on_record(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = open_stream(EDITORS["d4s"]())
    miner = miner_of(stream)

    def refuse(*args: Any) -> None:
        raise EditRefusedError("not finite")

    monkeypatch.setattr(stream.editor, "propose", refuse)
    row = miner.try_edit(tiny_requests()[0])
    assert (row.refused, math.isnan(row.ratio)) == ("not finite", True)
    assert choose_hard([row], keep=1) == []


def test_an_edited_model_is_no_place_to_begin() -> None:
    stream = open_stream(EDITORS["d4s"]())
    stream.session.apply(stream.session.propose(tiny_requests()[:1]))
    with pytest.raises(ArgumentError, match="this one has been edited"):
        miner_of(stream)


def test_hard_edits_are_the_worst_and_can_be_read_again(tmp_path: Path) -> None:
    requests = {request.id: request for request in tiny_requests()}
    rows = [SingleEdit("0", 2.5), SingleEdit("1", 2.0), SingleEdit("2", math.inf), SingleEdit("3", 0.9)]
    hard = choose_hard(rows)
    assert [row.id for row in hard] == ["2", "0"]
    assert [row.id for row in choose_hard(rows, keep=3)] == ["2", "0", "1"]
    path = tmp_path / "hard.json"
    path.write_text(json.dumps(as_records(hard, requests), allow_nan=False))
    assert load_requests("file", str(path))[0] == [requests["2"], requests["0"]]


def test_a_folder_goes_on_after_a_crash(tmp_path: Path) -> None:
    def hard_folder() -> ResultsFolder[SingleEdit]:
        return ResultsFolder(tmp_path, SingleEdit.from_dict, "search", "records.jsonl")

    folder = hard_folder()
    settings = {"editor": {"clamp": math.inf}, "data": "a"}
    assert folder.open(settings) == []
    rows = [
        SingleEdit("a", math.inf, {"mean": math.inf, "median": 2.0, "corpus": 3.0}, 0.5, 0.25, True, 0.125),
        SingleEdit("b", refused="no"),
    ]
    for row in rows:
        folder.append(asdict(row))
    with folder.results.open("ab") as file:
        file.write(b'{"id": "c", "rat')
    found = {row.id: row for row in hard_folder().open(settings)}
    assert list(found) == ["a", "b"]
    assert found["a"] == rows[0]
    assert math.isnan(found["b"].growth)
    last = SingleEdit("c", 1.0, dict.fromkeys(("mean", "median", "corpus"), 1.0), 1.0, 1.0, True, 0.0)
    folder.append(asdict(last))
    assert [row.id for row in folder.open(settings)] == ["a", "b", "c"]
    with pytest.raises(ArgumentError, match=r"other settings \(data 'a', now 'b'\)"):
        folder.open({**settings, "data": "b"})
    with folder.results.open("ab") as file:
        file.write(b"{}\n")
    with pytest.raises(UserError, match=r"records\.jsonl:4: damaged"):
        folder.open(settings)


@pytest.fixture
def command(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line on the tiny model."""
    monkeypatch.chdir(tmp_path)
    moments = FixedStatistics.compute
    monkeypatch.setattr(KeyStatistics, "compute", moments)
    data = tmp_path / "data.json"
    data.write_text(json.dumps([request.as_dict() for request in tiny_requests()]))
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS))
    settings = "--model.editor.init_args.layers=[1] --model.editor.init_args.contexts=plain"
    settings += " --model.editor.init_args.target.steps=3"
    return ["mine-hard", "--model", str(tiny_folder), "--data", str(data), "--texts", str(texts), *settings.split()]


def test_a_search_from_the_command_line(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[str] = []
    original = Miner.try_edit

    def cut(self: Miner, request: EditRequest) -> SingleEdit:
        if len(tried) == 2:
            raise KeyboardInterrupt
        tried.append(request.id)
        return original(self, request)

    monkeypatch.setattr(Miner, "try_edit", cut)
    out = tmp_path / "out"
    command += ["--out", str(out)]
    assert main([*command, "--offset", "1", "--limit", "3"]) == 130
    assert not (out / "hard.json").exists()

    monkeypatch.setattr(Miner, "try_edit", lambda self, r: tried.append(r.id) or original(self, r))
    assert main([*command, "--offset", "1", "--limit", "3", "--keep", "2"]) == 0
    assert tried == ["1", "2", "3"]
    rows = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == tried
    worst = sorted(rows, key=lambda row: -row["ratio"])
    hard = json.loads((out / "hard.json").read_text())
    assert [record["id"] for record in hard] == [row["id"] for row in worst[:2]]
    assert hard[0]["hard"]["ratio"] == worst[0]["ratio"]
    requests = {request.id: request for request in tiny_requests()}
    assert load_requests("file", str(out / "hard.json"))[0] == [requests[row["id"]] for row in worst[:2]]
    said = capsys.readouterr().out
    assert "hard (the worst 2): 2" in said
    assert requests[worst[0]["id"]].text in (out / "worst.md").read_text()

    # more records, and another bound: what was tried counts
    assert main([*command, "--limit", "4", "--factor", "1e9"]) == 0
    assert tried == ["1", "2", "3", "0"]
    assert json.loads((out / "hard.json").read_text()) == []

    # another editor does not go on here
    assert main([*command, "--method", "method/r_rome"]) == 2
    assert "with other settings (editor.class_path" in capsys.readouterr().err

    # edits behind the same ones are gone on with, others under the same names are not
    data = tmp_path / "data.json"
    records = json.loads(data.read_text())
    data.write_text(json.dumps([*records, {**records[0], "id": "new", "target_new": "blue"}]))
    assert main(command) == 0
    assert tried[-1] == "new"
    data.write_text(json.dumps([{**records[0], "target_new": "green"}, *records[1:]]))
    capsys.readouterr()
    assert main(command) == 2
    assert "edit '0' was made with other data (target_new " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "none.json"], "--data none.json: no such file"),
        (["--factor", "0"], "--factor must be a number above 0, got 0.0"),
        (["--method", "method/none"], "method/none: no such file"),
        (["--offset", "-1"], "data.offset must be at least 0, got -1"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *words]) == 2
    assert message in capsys.readouterr().err
