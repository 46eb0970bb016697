"""ProtocolMetrics and MEPerplexity on a small stream: what they report is what the functions find."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lit_edit.callbacks import ClosingTable, MEPerplexity, ProtocolMetrics, RunFolder
from lit_edit.callbacks.closing_table import summary_table
from rich.console import Console

from lit_edit.data.request import DataError, EditRequest, Probe
from lit_edit.loggers.run_csv import read_rows
from lit_edit.metrics.evaluation import measure_perplexity
from lit_edit.metrics.generated import (
    evaluate_generation,
    evaluate_portability,
    summarise_generation,
    summarise_portability,
)
from lit_edit.metrics.texts import fit_vectorizer
from lit_edit.stream.edit_stream import EditStream
from lit_edit.testing import tiny_requests
from tests.streams import make_data, make_stream, make_trainer

TEXTS = ["A plain sentence of some words.", "The book Hamlet was written by a man", "one two three"]
REFERENCES = {"Vienna": "Vienna is a city on the Danube.", "Greek": "Greek is a language of Greece."}


def edits() -> list[EditRequest]:
    first, *rest = tiny_requests()
    probes = (Probe("Rome is in", "Chile"),)
    return [replace(first, portability={"alias": probes}, locality={"near": probes}), *rest]


def data(requests: list[EditRequest] | None = None) -> Any:
    module = make_data()
    module.requests = edits() if requests is None else requests
    return module


def references(folder: Path) -> str:
    path = folder / "references.json"
    path.write_text(json.dumps([{"target": name, "text": text} for name, text in REFERENCES.items()]))
    return str(path)


def sentences(folder: Path) -> str:
    path = folder / "sentences.json"
    path.write_text(json.dumps([{"Corpus": "C4", "Text": text} for text in TEXTS]))
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[EditStream, Path]:
    folder = tmp_path_factory.mktemp("run")
    stream = make_stream()
    callbacks = [
        ProtocolMetrics(every=4, sample=4, length=16, references=references(folder), ends=2, bins=3,
                        published="zsre_easyedit"),
        MEPerplexity(every=3, path=sentences(folder)),
        RunFolder(),
        ClosingTable(),
    ]  # fmt: skip
    make_trainer(folder, callbacks).fit(stream, data())
    return stream, folder


def test_before_and_after_are_what_the_functions_find(run: tuple[EditStream, Path]) -> None:
    stream, folder = run
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    ids = [row["id"] for row in map(json.loads, (folder / "generations.jsonl").read_text("utf-8").splitlines())]
    chosen = [r for r in edits() if r.id in ids]
    assert len(chosen) == summary["final"]["sample"] == 4
    referred = [replace(r, references=(REFERENCES[r.target_new],)) if r.target_new in REFERENCES else r for r in chosen]
    vectorizer = fit_vectorizer([[text] for text in REFERENCES.values()])
    views = {"base": stream.ledger.original(), "final": stream.adapter}
    kinds = {name: evaluate_portability(view, stream.tokenizer, chosen) for name, view in views.items()}
    for stage, view in views.items():
        found = evaluate_generation(view, stream.tokenizer, referred, length=16, vectorizer=vectorizer)
        expected = summarise_generation(found) | summarise_portability(kinds[stage], {k.id: k for k in kinds["base"]})
        assert {name: summary[stage][name] for name in expected} == expected
        assert summary[stage]["efficacy"] == stream.summary()[stage]["efficacy"]
    assert summary["base"]["fluency"] != summary["final"]["fluency"]
    assert [point["edits"] for point in summary["protocol"]] == [4]


def test_the_texts_are_kept(run: tuple[EditStream, Path]) -> None:
    rows = [json.loads(row) for row in (run[1] / "generations.jsonl").read_text("utf-8").splitlines()]
    assert all(row["text"].startswith(row["prompt"]) for row in rows if "text" in row)
    assert sum("answer" in row for row in rows) == sum("text" in row for row in rows) == 4


def test_age_curves_are_over_all_edits(run: tuple[EditStream, Path]) -> None:
    stream, folder = run
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    probes = [stream.results["final"][str(number)].efficacy[0] for number in range(6)]
    won = [float(probe.preferred < probe.other) for probe in probes]
    right = [float(all(probe.hits)) for probe in probes]
    for name, values in (("success", won), ("accuracy", right)):
        ends = summary["final"]["age"][name]
        assert ends == {"early": sum(values[:2]) / 2, "late": sum(values[4:]) / 2, "size": 2}
        curve = summary["age_curves"][name]
        assert [(p["youngest"], p["oldest"], p["count"]) for p in curve] == [(0, 1, 2), (2, 3, 2), (4, 5, 2)]
        assert [p["mean"] for p in curve] == [sum(values[a : a + 2]) / 2 for a in (4, 2, 0)]


def test_both_localities_of_zsre_stand_in_the_summary(run: tuple[EditStream, Path]) -> None:
    summary = json.loads((run[1] / "summary.json").read_text("utf-8"))
    final = summary["final"]["locality"]
    assert summary["published"]["final"]["locality"] == 100 * final["agreement"]
    assert summary["published"]["base"]["locality"] == 100.0
    assert "token_accuracy" in final  # of zsre_kmeng


def test_what_is_logged(run: tuple[EditStream, Path]) -> None:
    columns, rows = read_rows(run[1] / "metrics.csv")
    assert {"base/fluency", "final/fluency", "final/consistency", "final/generation/efficacy/token_accuracy",
            "final/portability/alias", "final/age/success/early", "me_perplexity/mean", "me_perplexity/median",
            "final/me_perplexity/corpus", "protocol/fluency"} <= set(columns)  # fmt: skip
    steps = {row["step"] for row in rows if row["me_perplexity/mean"]}
    assert steps == {"0", "3", "6"}


def test_me_ppl_is_what_the_function_finds(run: tuple[EditStream, Path]) -> None:
    stream, folder = run
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    for stage, view in (("base", stream.ledger.original()), ("final", stream.adapter)):
        expected = measure_perplexity(view, stream.tokenizer, TEXTS, leading=False)
        assert summary[stage]["me_perplexity"] == pytest.approx(expected, rel=1e-5)
    assert [point["edits"] for point in summary["me_perplexity"]] == [0, 3, 6]


def test_the_closing_table_shows_them(run: tuple[EditStream, Path]) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(summary_table(run[0].summary()))
    text = console.export_text()
    assert "fluency (bits)" in text
    assert "efficacy accuracy, generated" in text


class Stop(ModelCheckpoint):
    """A checkpoint behind the fourth edit, and a power cut behind the fifth."""

    def on_train_batch_end(self, trainer: Any, stream: Any, *args: Any) -> None:
        super().on_train_batch_end(trainer, stream, *args)
        if stream.edits_made == 5:
            raise RuntimeError("power cut")


def test_a_resumed_run_reports_the_same(tmp_path: Path, run: tuple[EditStream, Path]) -> None:
    def callbacks(kind: Any) -> list[Any]:
        keep = kind(dirpath=tmp_path / "checkpoints", every_n_train_steps=2, save_top_k=-1)
        return [ProtocolMetrics(sample=2, length=8, every=4), MEPerplexity(every=2, path=sentences(tmp_path)), keep]

    whole = make_stream()
    make_trainer(tmp_path / "whole", callbacks(ModelCheckpoint)[:2]).fit(whole, data())
    with pytest.raises(RuntimeError, match="power cut"):
        make_trainer(tmp_path / "cut", callbacks(Stop), enable_checkpointing=True).fit(make_stream(), data())
    resumed = make_stream()
    path = str(tmp_path / "checkpoints" / "epoch=0-step=4.ckpt")
    make_trainer(tmp_path / "cut", callbacks(ModelCheckpoint)).fit(resumed, data(), ckpt_path=path, weights_only=True)
    left, right = whole.summary(), resumed.summary()
    assert json.dumps({**left, "seconds": 0}) == json.dumps({**right, "seconds": 0})
    assert left["final"]["fluency"] is not None

    # At its end there is nothing to train, and yet everything is reported.
    again = make_stream()
    path = str(tmp_path / "checkpoints" / "epoch=0-step=6.ckpt")
    make_trainer(tmp_path / "cut", callbacks(ModelCheckpoint)).fit(again, data(), ckpt_path=path, weights_only=True)
    assert json.dumps({**again.summary(), "seconds": 0}) == json.dumps({**left, "seconds": 0})

    # What was measured of other texts is not continued.
    other = tmp_path / "other.txt"
    other.write_text("Quite another sentence is here.\n")
    anew, first = MEPerplexity(every=2, path=str(other)), callbacks(ModelCheckpoint)
    make_trainer(tmp_path / "cut", [first[0], anew, first[2]]).fit(
        make_stream(), data(), ckpt_path=path, weights_only=True
    )
    assert [point["edits"] for point in anew.history] == [0, 6]

    # Nor texts that were written otherwise.
    longer = ProtocolMetrics(sample=2, length=9, every=4)
    longer.load_state_dict({**callbacks(ModelCheckpoint)[0].state_dict(), "history": [{"edits": 4}], "base": []})
    assert longer.history == []


def test_a_collapse_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stream = make_stream()
    watch = MEPerplexity(every=1, path=sentences(tmp_path), limit=2)

    measured = iter([20.0, 30.0, 1001.0, 2000.0, float("nan"), 50.0, 3000.0])
    stream.measure_texts = lambda texts, adapter, leading=True: dict.fromkeys(  # type: ignore[method-assign]
        ("mean", "median", "corpus"), next(measured) if len(texts) == 2 and not leading else 1.0
    )
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, [watch]).fit(stream, data())
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("collapse")]
    assert len(told) == 2  # at the second edit, and again at the sixth, after the model was well at the fifth
    assert "mean perplexity of 2 sentences is 1001 (bound 1000), up from 30: one of the edits 2 to 2" in told[0]
    assert "up from 50: one of the edits 6 to 6" in told[1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProtocolMetrics(every=-1), "ProtocolMetrics: every must be at least 0"),
        (lambda: ProtocolMetrics(top_k=0), "ProtocolMetrics: top_k must be at least 1"),
        (lambda: ProtocolMetrics(ends=0), "ends must be a number of edits or a share below 1"),
        (lambda: ProtocolMetrics(published="rome"), "published must be one of counterfact, zsre_kmeng"),  # type: ignore[arg-type]
        (lambda: MEPerplexity(every=0), "MEPerplexity: every must be at least 1"),
        (lambda: MEPerplexity(threshold=1), "threshold must be above 1"),
    ],
)
def test_wrong_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_broken_files_end_a_run_before_its_first_edit(tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('[{"target": "Rome"}]')
    for callback in (ProtocolMetrics(references=str(bad)), MEPerplexity(path=str(bad))):
        stream = make_stream()
        with pytest.raises(DataError, match=r"bad\.json"):
            make_trainer(tmp_path, [callback]).fit(stream, data())
        assert stream.model is None or not len(stream.ledger)


def test_references_are_found_by_relation_and_id_first() -> None:
    callback = ProtocolMetrics()
    callback._filed = {("P1", "Q5"): ["by id"], ("", "Vienna"): ["by name"]}
    plain = tiny_requests()[0]
    assert callback._with_references(plain).references == ("by name",)
    assert callback._with_references(replace(plain, relation="P1", target_id="Q5")).references == ("by id",)
    assert callback._with_references(replace(plain, references=("own",))).references == ("own",)
    assert callback._with_references(replace(plain, target_new="Bern")).references == ()
    assert torch.is_grad_enabled()
