"""The report: what it says is what the run folder says, whatever the texts are and however far the run has come."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lit_edit.callbacks import LayerNorms, RunFolder, RunReport

from lit_edit.cli.main import main
from lit_edit.data.request import EditRequest, Probe
from lit_edit.files.paths import write_json
from lit_edit.ledger.history import EditHistory, LedgerEntry
from lit_edit.ledger.journal import Journal
from lit_edit.loggers.run_csv import RunCSVLogger
from lit_edit.metrics.evaluation import EditResult, ProbeResult, flatten
from lit_edit.report import ReportError, read_run, write_comparison, write_report
from lit_edit.report.charts import Series, as_plain, draw
from lit_edit.report.edits import changed_neighbours, edits_of
from lit_edit.runs.answers import answers_path, read_answers, write_answers
from lit_edit.runs.files import edit_rows, journal_path
from lit_edit.runs.reading import read_log
from lit_edit.stream.edit_stream import EditStream
from tests.streams import make_data, make_stream, make_trainer

IN_LEDGER = ("journal", "edits.jsonl", "answers.jsonl")
FILES = ("summary.json", "metrics.csv", "config.yaml", *(f"ledger/{name}" for name in IN_LEDGER))
EVIL = "<script>alert(1)</script>"
WEIGHT = "model.layers.6.mlp.down_proj.weight"
WORDS = {1: " Rome", 2: " Vienna", 3: " Madrid", 4: "\n", 5: f" {EVIL}", 6: " Oslo"}
TOKENIZER: Any = SimpleNamespace(decode=lambda ids: "".join(WORDS[i] for i in ids))


def request_of(number: int, subject: str = "Italy", new: str = "Vienna", **fields: Any) -> EditRequest:
    neighbours = (Probe("The capital of Spain is", "Madrid"),)
    return EditRequest(
        f"id{number}", "The capital of {} is", subject, new, target_true="Rome", neighborhood=neighbours, **fields
    )


def probe(choice: Sequence[int], hits: Sequence[bool], p: float, other: float) -> ProbeResult:
    return ProbeResult(-math.log(p), -math.log(other), tuple(hits), tuple(choice))


def result(request: EditRequest, own: ProbeResult, neighbour: ProbeResult) -> EditResult:
    return EditResult(request.id, (own,), (), (neighbour,))


TOOK, NOT = probe([2], [True], 0.9, 0.01), probe([1], [False], 0.05, 0.6)
KEPT, LOST = probe([3], [True], 0.7, 0.1), probe([2], [False], 0.1, 0.6)


def summary_of(final: float = 0.75) -> dict[str, Any]:
    def stage(value: float, perplexity: float | None) -> dict[str, Any]:
        kinds: dict[str, Any] = {k: {"success": value, "accuracy": value / 2} for k in ("efficacy", "generalization")}
        return {**kinds, "locality": {"success": 0.5, "agreement": 0.875}, "score": value, "perplexity": perplexity}

    norms = {"mean_abs_before": 0.1, "mean_abs_after": 0.1025, "mean_abs_delta": 0.01, "relative_change": 0.08}
    return {
        "edits": 3,
        "base": stage(0.125, 50.0),
        "immediate": stage(1.0, None),
        "final": stage(final, 55.0),
        "seconds": {"per_edit": 1.234},
        "layers": {WEIGHT: norms},
    }


def make_run(
    folder: Path,
    requests: Sequence[EditRequest],
    final: Sequence[ProbeResult],
    *,
    ended: bool = True,
    neighbour: ProbeResult = LOST,
    summary: dict[str, Any] | None = None,
    editor: str = "D4S",
) -> Path:
    """A run folder as lit-edit fit leaves it; one more edit is refused, and one taken out."""
    folder.mkdir(parents=True)
    settings = {"seed_everything": 0, "model": {"editor": {"class_path": f"lit_edit.editors.{editor}"}}}
    (folder / "config.yaml").write_text(yaml.safe_dump({**settings, "run_name": folder.name}))
    facts = {"target_probability": 0.96}
    journal = Journal(journal_path(folder))
    journal.append({"kind": "begin", "facts": False})
    for number, one in enumerate(requests, 1):
        entry = LedgerEntry(one.id, one.subject, one.text, one.target_new, facts, one.as_dict(), number)
        journal.append({"kind": "edit", "entries": [entry.as_record()], "facts": False, "time": "2026-01-02T03:04:05"})
    if requests:
        journal.append({"kind": "refused", "ids": ["bad one"], "reason": "a key is not finite", "facts": False})
    history = EditHistory.of(journal.records)
    results = {
        "base": {one.id: result(one, NOT, KEPT) for one in requests},
        "immediate": {one.id: result(one, TOOK, KEPT) for one in requests},
        "final": {one.id: result(one, own, neighbour) for one, own in zip(requests, final, strict=True)},
    }
    logger = RunCSVLogger(str(folder))
    logger.log_metrics({**flatten(summary_of()["base"], "base"), f"norm/{WEIGHT}/mean_abs_w": 0.1}, step=0)
    for step in range(1, len(requests) + 1):
        logger.log_metrics({"immediate/efficacy/accuracy": 1.0, "time/edit": 2.0}, step=step)
        logger.log_metrics({f"norm/{WEIGHT}/mean_abs_w": 0.1 + 0.001 * step}, step=step)
    if not ended:
        logger.log_metrics(flatten({"efficacy": {"success": 0.6}}, "retention"), step=len(requests))
        results["final"] = {}
    else:
        journal.append({"kind": "end", "facts": False})
        write_json(folder / "summary.json", summary or summary_of())
        rows = "".join(json.dumps(row) + "\n" for row in edit_rows(history, results))
        (folder / "ledger" / "edits.jsonl").write_text(rows)
    logger.save()
    write_answers(folder, history, results, TOKENIZER)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    requests = [request_of(1), request_of(2, "Peru"), request_of(3, "Chad")]
    return make_run(tmp_path / "x", requests, [TOOK, NOT, probe([3], [False], 0.4, 0.2)])


def page_of(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


class Reader(HTMLParser):
    """The tags of a page, its attributes, and its text by section; fails where tags do not close."""

    VOID = ("meta", "input", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {"": ""}
        self.scripts: list[str] = []
        self._open: list[str] = []
        self._section = ""
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self._section = str(dict(attrs)["id"])
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        self._section = "" if tag == "section" else self._section

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self._open[-1:] != ["style"]:
            self.texts[self._section] = self.texts.get(self._section, "") + f"{data} "

    def text(self, section: str) -> str:
        return " ".join(self.texts[section].split())


# ---- numbers ------------------------------------------------------------------------------------------------------


def test_the_headlines_are_those_of_the_summary_with_the_change_since_base(run: Path) -> None:
    numbers = Reader(page_of(run)).text("numbers")
    assert "Efficacy success 75.0% +62.5 points from 12.5%" in numbers
    assert "Efficacy accuracy 37.5% +31.2 points from 6.2%" in numbers
    assert "Locality agreement 87.5% ±0 from 87.5%" in numbers
    assert "Perplexity 55.0 +10.0% from 50.0" in numbers
    assert "Mean |W| +2.50%" in numbers
    assert "Seconds per edit 1.23" in numbers
    assert "efficacy success 12.5% 100.0% 75.0% +62.5 points" in numbers  # the table of all metrics


def test_what_the_longer_protocols_have_measured_is_shown(tmp_path: Path) -> None:
    def scores(right: float) -> dict[str, Any]:
        known = {"accuracy": right, "accuracy_low": right - 0.1, "accuracy_high": right + 0.1}
        return {"majority": 0.5, "likelihood": known}

    summary = summary_of()
    summary["base"] |= {"fluency": 5.0, "portability": {"reasoning": 0.25, "aliases": 0.75}, "sample": 20}
    summary["final"] |= {"fluency": 4.5, "portability": {"reasoning": 0.5, "aliases": 0.75}, "sample": 20}
    summary["base"]["me_perplexity"] = {"mean": 50.0, "median": 40.0, "corpus": 30.0}
    summary["final"]["me_perplexity"] = {"mean": 100.0, "median": 41.0, "corpus": 31.0}
    change = {"likelihood": {"accuracy": -0.25, "accuracy_low": -0.4, "accuracy_high": -0.1}}
    summary["ability"] = {"base": {"sst2": scores(0.75)}, "final": {"sst2": scores(0.5)}, "change": {"sst2": change}}
    run = make_run(tmp_path / "x", [request_of(1)], [TOOK], summary=summary)
    with (run / "metrics.csv").open() as file:
        names = file.readline().strip().split(",")
    logger = RunCSVLogger(str(run))
    for step, value in ((0, 0.75), (1, 0.5)):
        logger.log_metrics({"ability/sst2/accuracy": value, "me_perplexity/mean": 50.0 + 50 * step}, step=step)
    logger.save()
    assert "ability/sst2/accuracy" not in names
    other = make_run(tmp_path / "y", [request_of(1)], [TOOK], summary=summary_of(0.5))
    beside = Reader(write_comparison([run, other], tmp_path / "c.html").read_text(encoding="utf-8")).text("numbers")
    assert "me perplexity mean 100 –" in beside
    assert "portability reasoning 50.0% –" in beside
    assert "general ability 50.0% –" in beside
    page = Reader(page_of(run))
    numbers = page.text("numbers")
    assert "Fluency 4.50 −10.0% from 5.00" in numbers.replace("-10", "−10")
    assert "Portability 62.5% +12.5 points from 50.0%" in numbers
    assert "ME-PPL 100 +100.0% from 50.0" in numbers
    assert "General ability 50.0% −25.0 points from 75.0%" in numbers
    assert "portability reasoning 25.0% – 50.0% +25.0 points" in numbers  # the table of all metrics
    assert "sst2 50.0% 75.0% (65.0%–85.0%) 50.0% (40.0%–60.0%) −25.0 points (−40 to −10)" in numbers
    curves = page.text("curves")
    assert "General ability" in curves
    assert "ME-PPL" in curves


def test_the_layers_are_those_of_the_summary(run: Path) -> None:
    assert "layer 6 0.10000 0.10250 +2.50% 0.01000 8.0%" in Reader(page_of(run)).text("layers")


def test_answers_of_base_and_edited_model_are_shown_for_every_edit(run: Path) -> None:
    table = Reader(page_of(run)).text("edits")
    assert "1 The capital of Italy is Vienna not Rome Rome p(Vienna) 0.050 Vienna p 0.90 Vienna p 0.90 holds" in table
    assert (
        "2 The capital of Peru is Vienna not Rome Rome p(Vienna) 0.050 Vienna p 0.90 Rome p(Vienna) 0.050 forgotten"
        in table
    )
    assert (
        "3 The capital of Chad is Vienna not Rome Rome p(Vienna) 0.050 Vienna p 0.90 Madrid p(Vienna) 0.40 preferred"
        in table
    )


def test_failures_are_listed_with_their_reason(run: Path) -> None:
    failed = Reader(page_of(run)).text("failed")
    assert "bad one refused a key is not finite" in failed
    assert (
        "it held right after it was made (p 0.90); the model says “Rome”: p(Vienna) is 0.050, p(Rome) is 0.60" in failed
    )
    assert "“Vienna” is preferred to “Rome” (p 0.40 against 0.20), but the model says “Madrid”; it held right" in failed
    assert "Italy" not in failed  # it holds


def test_edits_taken_out_say_why(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "x", [request_of(1), request_of(2, "Peru")], [TOOK, TOOK])
    record = {"kind": "undo", "removed": [1], "reason": "replaced by 'id2'", "origin": "user", "facts": False}
    Journal(journal_path(folder)).append(record)
    edits = edits_of(read_run(folder))
    assert [(edit.state, edit.why) for edit in edits] == [("undone", "replaced by 'id2'"), ("holds", "")]


def test_the_page_and_the_log_judge_alike(tmp_path: Path) -> None:
    requests = [request_of(1), request_of(2, "Peru"), request_of(3, "Chad"), request_of(4, "Mali"), request_of(5)]
    folder = make_run(tmp_path / "x", requests, [TOOK, NOT, TOOK, NOT, TOOK])
    journal = Journal(journal_path(folder))
    journal.append({"kind": "undo", "removed": [3], "reason": "undone", "origin": "user", "facts": False})
    entry = LedgerEntry("id6", "Italy", requests[0].text, "Oslo", {}, requests[0].as_dict(), 6).as_record()
    journal.append({"kind": "edit", "entries": [entry], "removed": [1], "reason": "replaced by 'id6'", "facts": False})
    edits, log = edits_of(read_run(folder)), read_log(folder)
    assert [edit.state for edit in edits] == ["replaced", "forgotten", "undone", "forgotten", "holds", "not measured"]
    assert [verdict.state for verdict in log.verdicts[:2]] == ["replaced", "not measured"]  # its files are of before
    assert edits[0].why == log.verdicts[0].reasons[0] == "by edit 6 (The capital of Italy is → Oslo)"
    assert "bad one refused a key is not finite" in Reader(page_of(folder)).text("failed")


@pytest.mark.parametrize(
    ("reached", "why"),
    [(0.2, "its target reached only p 0.20 when it was fitted"), (0.97, "its target was found (p 0.97)")],
)
def test_an_edit_that_never_took_says_at_which_step(tmp_path: Path, reached: float, why: str) -> None:
    run = read_run(make_run(tmp_path / "x", [request_of(1)], [NOT]))
    run.edits[0]["target_probability"] = reached
    prompts = run.answers[1]["prompts"]
    prompts[0]["immediate"] = prompts[0]["base"]
    (edit,) = edits_of(run)
    assert edit.state == "never took"
    assert why in edit.why
    assert "the model says “Rome”: p(Vienna) is 0.050, p(Rome) is 0.60" in edit.why


def test_neighbours_that_changed_are_shown_before_and_after(run: Path) -> None:
    found, compared = changed_neighbours(read_run(run), edits_of(read_run(run)))
    assert compared == len(found) == 3
    assert (found[0].base.text, found[0].final.text, found[0].verdict) == ("Madrid", "Vienna", "says the edit’s object")
    text = Reader(page_of(run)).text("neighbours")
    assert "3 of 3 neighbours" in text
    assert (
        "The capital of Spain is Madrid Madrid p 0.70 Vienna p(Madrid) 0.10 says the edit’s object 1: Italy → Vienna"
        in text
    )


def test_neighbours_that_did_not_change_are_not_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "x", [request_of(1)], [TOOK], neighbour=KEPT)
    assert "0 of 1 neighbours" in Reader(page_of(folder)).text("neighbours")


def test_what_is_said_ends_with_the_first_token_that_leaves_the_object(tmp_path: Path) -> None:
    request = request_of(1)
    history = EditHistory.listing([LedgerEntry("id1", "Italy", request.text, "Vienna", {}, request.as_dict())])
    long = probe([2, 1, 3], [True, False, True], 0.3, 0.1)
    write_answers(tmp_path, history, {"base": {"id1": result(request, long, KEPT)}}, TOKENIZER)
    (row,) = read_answers(tmp_path)
    assert row["prompts"][0]["base"]["choice"] == " Vienna Rome"
    write_answers(tmp_path, history, {"final": {"id1": result(request, TOOK, KEPT)}}, TOKENIZER)
    (row,) = read_answers(tmp_path)  # what was measured before stays
    assert (row["prompts"][0]["base"]["choice"], row["prompts"][0]["final"]["choice"]) == (" Vienna Rome", " Vienna")


# ---- one file, no network, no script but ours ---------------------------------------------------------------------


def hostile(folder: Path) -> Path:
    requests = [request_of(1, f"Italy{EVIL}", f"Vienna\"'{EVIL}"), request_of(2, "Chad & <b>sons</b>", "{{ 7 * 7 }}")]
    make_run(folder, requests, [probe([5], [False], 0.2, 0.1), probe([4], [False], 0.1, 0.2)])
    journal = Journal(journal_path(folder))
    journal.append(
        {"kind": "refused", "ids": [EVIL], "reason": f'"><img src=x onerror=alert(1)>{EVIL}', "facts": False}
    )
    config = folder / "config.yaml"
    config.write_text(f"{config.read_text()}note: '</pre></details>{EVIL}'\n")
    return folder


def check_alone(page: str) -> Reader:
    reader = Reader(page)
    assert len(reader.scripts) == 1
    assert EVIL not in page
    assert not {tag for tag, _ in reader.tags} & {"img", "link", "iframe", "object", "embed", "base", "form"}
    for _, attributes in reader.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "xlink:href")]
        assert str(attributes.get("href", "#")).startswith("#")
    assert not re.search(r"https?://|url\(|@import|//cdn", page)
    return reader


def test_texts_of_users_are_escaped(tmp_path: Path) -> None:
    page = page_of(hostile(tmp_path / "x"))
    reader = check_alone(page)
    assert html.escape(EVIL) in page
    assert f"Italy{EVIL}" in reader.text("edits").replace(" <", "<")
    assert "Chad & <b>sons</b>" in reader.text("edits")
    assert "{{ 7 * 7 }}" in reader.text("edits")
    assert "onerror" in reader.text("failed")


def test_a_name_of_a_folder_is_escaped_in_comparisons(tmp_path: Path) -> None:
    folders = [hostile(tmp_path / name) for name in ("<b>one", "two&amp;")]
    reader = check_alone(write_comparison(folders, tmp_path / "out.html").read_text(encoding="utf-8"))
    assert "<b>one" in reader.text("numbers")
    assert "two&amp;" in reader.text("numbers")


def test_the_page_may_run_its_own_script_only_and_load_nothing(run: Path) -> None:
    import base64
    import hashlib

    reader = Reader(page_of(run))
    (policy,) = [a["content"] for tag, a in reader.tags if tag == "meta" and "http-equiv" in a]
    digest = base64.b64encode(hashlib.sha256(reader.scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in str(policy)
    assert str(policy).startswith("default-src 'none'")


def test_a_page_of_many_edits_stays_small(tmp_path: Path) -> None:
    requests = [request_of(n, f"country number {n} of a long name") for n in range(1, 301)]
    folder = make_run(tmp_path / "x", requests, [NOT] * 300)
    assert write_report(folder).stat().st_size < 1_000_000


# ---- runs that did not come to their end --------------------------------------------------------------------------


def test_an_interrupted_run_has_a_report_of_what_was_measured(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "x", [request_of(1), request_of(2, "Peru")], [TOOK, TOOK], ended=False)
    write_json(folder / "run.json", {"asked": 9, "versions": {"lit-edit": "1.2.3"}})
    reader = Reader(page_of(folder))
    assert "not finished 3 of 9 edits dealt with; it goes on with lit-edit fit" in reader.text("")
    assert "Efficacy success 60.0% +47.5 points from 12.5%" in reader.text("numbers")
    assert "those of the last measurement on the way, after 2 edits" in reader.text("numbers")
    assert "Seconds per edit 2.00" in reader.text("numbers")
    assert (
        "The capital of Peru is Vienna not Rome Rome p(Vienna) 0.050 Vienna p 0.90 not measured holds"
        in reader.text("edits")
    )
    assert "lit-edit 1.2.3" in reader.text("config")


def test_a_run_without_edits_has_a_report(tmp_path: Path) -> None:
    reader = Reader(page_of(make_run(tmp_path / "x", [], [], ended=False)))
    assert "No edit was made." in reader.text("edits")
    assert "0 edits" in reader.text("")


@pytest.mark.parametrize(
    "lost",
    ["summary.json", "metrics.csv", "config.yaml", "ledger/journal", "ledger/edits.jsonl", "ledger/answers.jsonl"],
)
@pytest.mark.parametrize("damage", ["gone", "half"])
def test_a_report_is_made_of_what_is_left(run: Path, lost: str, damage: str) -> None:
    whole = (run / lost).read_bytes()
    (run / lost).write_bytes(whole[: len(whole) // 2]) if damage == "half" else (run / lost).unlink()
    reader = Reader(page_of(run))
    assert "Italy" in reader.text("edits")


@pytest.mark.parametrize("lost", ["hit", "prompt", "kind"])
def test_a_report_is_made_of_answers_that_lack_something(run: Path, lost: str) -> None:
    path = run / "ledger" / "answers.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    prompt = rows[0]["prompts"][0]
    for place in (prompt, *(prompt[stage] for stage in ("base", "final") if stage in prompt)):
        place.pop(lost, None)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "run.json").write_text('{"versions": 3}')
    assert "Italy" in Reader(page_of(run)).text("edits")


def test_values_that_are_not_finite_break_no_page(run: Path) -> None:
    with (run / "metrics.csv").open("a") as file:
        columns = (run / "metrics.csv").read_text().splitlines()[0].split(",")
        file.write(",".join("4" if c == "step" else "inf" if c == "base/perplexity" else "" for c in columns) + "\n")
    assert 'class="beyond"' in page_of(run)


def test_a_run_does_not_fail_for_its_report(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lit_edit.callbacks.report.write_report", fail)
    trainer: Any = SimpleNamespace(is_global_zero=True, loggers=[], default_root_dir=str(run))
    RunReport().write(trainer, SimpleNamespace(), run)  # type: ignore[arg-type]
    assert "report.html was not written ([Errno 28] No space left on device); lit-edit report --run" in caplog.text


def test_an_exception_before_the_first_edit_leaves_no_report(tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(is_global_zero=True, loggers=[], default_root_dir=str(tmp_path))
    RunReport().on_exception(trainer, make_stream(), KeyboardInterrupt())
    assert list(tmp_path.iterdir()) == []


# ---- written by a run itself --------------------------------------------------------------------------------------


def fit_two(folder: Path, kind: type[EditStream] = EditStream) -> None:
    stream = make_stream(kind=kind)
    stream.journal = str(journal_path(folder))
    trainer = make_trainer(folder, [LayerNorms(), RunFolder(), RunReport()])
    trainer.fit(stream, make_data(2))


def test_a_fit_ends_with_a_report_of_what_its_summary_says(tmp_path: Path) -> None:
    fit_two(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    reader = check_alone((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "finished 2 edits" in reader.text("")
    now, before = (summary[stage]["efficacy"]["accuracy"] for stage in ("final", "base"))
    assert f"Efficacy accuracy {100 * now:.1f}%" in reader.text("numbers")
    assert f"from {100 * before:.1f}%" in reader.text("numbers")
    assert f"Perplexity {as_plain(summary['final']['perplexity'])}" in reader.text("numbers")
    assert "Marie Curie" in reader.text("edits")
    assert f"torch {torch.__version__.partition('+')[0]}" in reader.text("config")
    (own, *_), (second, *_) = (row["prompts"] for row in read_answers(tmp_path))
    assert own["prompt"] == "The capital of Italy is"
    assert {"base", "immediate", "final"} <= set(second)


def test_a_fit_that_is_cut_leaves_a_report(tmp_path: Path) -> None:
    class Cut(EditStream):
        def apply_edit(self, proposal: Any) -> None:
            if len(self.ledger) == 1:
                raise ZeroDivisionError("cut")
            super().apply_edit(proposal)

    with pytest.raises(ZeroDivisionError, match="cut"):
        fit_two(tmp_path, Cut)
    reader = Reader((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "not finished 1 of 2 edits dealt with" in reader.text("")
    assert "The capital of Italy is Vienna not Rome" in reader.text("edits")
    assert "not measured" in reader.text("edits")
    assert "mean |W| before" in reader.text("layers")


# ---- several runs -------------------------------------------------------------------------------------------------


def test_two_runs_are_compared(tmp_path: Path, run: Path) -> None:
    requests = [request_of(1), request_of(2, "Peru"), request_of(3, "Chad")]
    other = make_run(tmp_path / "y", requests, [TOOK, TOOK, NOT], summary=summary_of(0.5), editor="MEMIT")
    reader = Reader(write_comparison([run, other], tmp_path / "c.html").read_text(encoding="utf-8"))
    numbers = reader.text("numbers")
    assert "efficacy success 75.0% 50.0%" in numbers
    assert "perplexity 55.0 (+10.0%) 55.0 (+10.0%)" in numbers
    assert reader.text("settings").endswith("lit_edit.editors.D4S lit_edit.editors.MEMIT")
    assert "run_name" not in reader.text("settings")
    facts = reader.text("facts")
    assert "3 edits were made in all runs" in facts
    assert "The capital of Peru is Vienna forgotten Rome p(Vienna) 0.050 holds Vienna p 0.90" in facts
    assert "Italy" not in facts


def test_the_best_of_a_row_is_marked_and_ties_are_not(tmp_path: Path, run: Path) -> None:
    other = make_run(tmp_path / "y", [request_of(1)], [TOOK], summary=summary_of(0.5))
    page = write_comparison([run, other], tmp_path / "c.html").read_text(encoding="utf-8")
    assert '<td class="best">75.0%</td><td>50.0%</td>' in page
    assert "<td>87.5%</td><td>87.5%</td>" in page


def test_runs_that_share_no_edit_are_not_ranked(tmp_path: Path, run: Path) -> None:
    other = make_run(tmp_path / "y", [request_of(1, "Kenya")], [TOOK], summary=summary_of(0.5))
    page = write_comparison([run, other], tmp_path / "c.html").read_text(encoding="utf-8")
    assert "<td>75.0%</td><td>50.0%</td>" in page
    assert 'class="best"' not in page


def test_runs_of_one_name_are_told_apart(tmp_path: Path, run: Path) -> None:
    other = make_run(tmp_path / "elsewhere" / "x", [request_of(1)], [TOOK])
    page = write_comparison([run, other], tmp_path / "c.html").read_text(encoding="utf-8")
    assert str(run) in page
    assert str(other) in page


# ---- the command --------------------------------------------------------------------------------------------------


def test_the_command_writes_one_report_or_a_comparison(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", "--run", str(run)]) == 0
    assert capsys.readouterr().out == f"{run}/report.html\n"
    assert (run / "report.html").is_file()
    other = make_run(tmp_path / "y", [request_of(1)], [TOOK])
    assert main(["report", "--runs", str(run), str(other), "--out", "both.html"]) == 0
    assert "2 runs side by side" in (tmp_path / "both.html").read_text(encoding="utf-8")
    assert main(["report", "--runs", str(run), str(run), "--out", "one.html"]) == 0  # one run, named twice
    assert "side by side" not in (tmp_path / "one.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--runs", "nowhere"], "there is no run folder nowhere"),
        (["--runs", "."], "is no run folder: it has none of summary.json, metrics.csv and ledger/journal"),
        (["--runs", "x", "--out", "."], "--out . is a folder"),
    ],
)
def test_what_cannot_be_reported_is_said(
    args: list[str], told: str, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    assert main(["report", *args]) == 2
    assert told in capsys.readouterr().err
    assert sorted(path.name for path in run.parent.iterdir()) == ["x"]


def test_a_comparison_needs_two_runs(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="two runs or more, got 1"):
        write_comparison([run], tmp_path / "c.html")


# ---- charts -------------------------------------------------------------------------------------------------------


def test_a_chart_places_its_values() -> None:
    chart = draw("a", [Series("one", [(0, 0.0), (10, 1.0)])], limits=(0.0, 1.0))
    assert chart is not None
    assert chart.series[0].path == f"M{chart.left} {chart.bottom}L{chart.right} {chart.top}"
    assert [text for _, text in chart.x_ticks] == ["0", "2", "4", "6", "8", "10"]
    assert [text for _, text in chart.y_ticks] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]


def test_a_value_that_is_not_finite_breaks_the_line() -> None:
    chart = draw("a", [Series("one", [(0, 1.0), (1, 2.0), (2, math.inf), (3, 2.0), (4, 1.0)])])
    assert chart is not None
    assert re.findall("[ML]", chart.series[0].path) == ["M", "L", "M", "L"]
    assert len(chart.series[0].beyond) == 1


def test_values_far_apart_are_drawn_logarithmically() -> None:
    chart = draw("a", [Series("one", [(0, 10.0), (1, 1e6)])])
    assert chart is not None
    assert chart.title == "a, logarithmic"
    assert [text for _, text in chart.y_ticks] == ["10", "100", "1,000", "10,000", "100,000", "1e+06"]


def test_nothing_is_drawn_of_nothing() -> None:
    assert draw("a", [Series("one", [])]) is None


@pytest.mark.parametrize("points", [[(5, 3.0)], [(0, 0.0), (1, 0.0)], [(0, math.nan)], [(0, -1.0), (1, -2.0)]])
def test_small_series_are_drawn(points: list[tuple[float, float]]) -> None:
    chart = draw("a", [Series("one", points)])
    assert chart is not None
    assert chart.y_ticks


def test_answers_that_cannot_be_read_are_none(tmp_path: Path) -> None:
    assert read_answers(tmp_path) == []
    answers_path(tmp_path).parent.mkdir()
    answers_path(tmp_path).write_text('{"number": "x"}\n')
    assert read_answers(tmp_path) == []
