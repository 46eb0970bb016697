"""``lit-edit trace`` on the tiny model: what it leaves, going on, errors."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from lit_edit.cli.main import main
from lit_edit.models import ModelAdapter
from lit_edit.studies.tracing import KnownFact, tokenize_fact
from lit_edit.studies.tracing.prompts import predict_next
from lit_edit.studies.tracing.trace import trace_fact
from lit_edit.testing import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Facts that the tiny model knows: what it says first; and one that it does not know."""
    adapter, tokenizer = ModelAdapter(tiny_model()), tiny_tokenizer()
    rows = []
    for subject, rest in product(("Italy", "Oslo", "Hamlet", "Emma"), ("is", "is in", "speaks", "was", "has a")):
        prompt = f"{subject} {rest}"
        fact = tokenize_fact(tokenizer, KnownFact("0", prompt, subject, "x", 0))
        said = tokenizer.decode(predict_next(adapter, [fact.ids], 0)).strip() or "x"
        made = tokenize_fact(tokenizer, KnownFact("0", prompt, subject, said, 0))
        if made.attribute == predict_next(adapter, [made.ids], 0)[0]:  # not every token can be said in text
            rows.append({"prompt": prompt, "subject": subject, "attribute": said})
    rows = rows[:3]
    assert len(rows) == 3
    rows.insert(1, {"prompt": "Rome was", "subject": "Rome", "attribute": "qqq"})
    path = tmp_path_factory.mktemp("facts") / "facts.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture
def trace(tmp_path: Path, tiny_folder: Path, facts: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.chdir(tmp_path)

    def run(*args: str, data: str = str(facts), draw: bool = False) -> int:
        if not draw:
            monkeypatch.setattr("lit_edit.cli.trace._draw", lambda *args: None)
        settings = ["--model", str(tiny_folder), "--samples", "2", "--window", "2", "--precision", "exact"]
        return main(["trace", "--data", data, "--out", "out", *settings, *args])

    return run


def test_what_is_left_behind(trace: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert trace(draw=True) == 0
    out = Path("out")
    shown = capsys.readouterr()
    assert shown.out.startswith("3 facts; average total effect ")
    assert "the model knows 3 of the 4 facts" in shown.err
    kept = [json.loads(line) for line in (out / "facts.jsonl").read_text().splitlines()]
    kept.sort(key=lambda fact: str(fact["id"]))  # they come as they are done
    assert [fact["id"] for fact in kept] == ["0", "2", "3"]
    with (out / "effects.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 4 * sum(len(fact["tokens"]) - fact["subject"][0] for fact in kept)
    for row in rows:
        fact = kept[["0", "2", "3"].index(row["fact"])]
        at = int(row["position"]) - fact["subject"][0]
        assert float(row["p_restored"]) == fact["restored"][row["kind"]][int(row["layer"])][at]
        assert float(row["effect"]) == float(row["p_restored"]) - fact["p_corrupt"]
    assert parquet.read_table(out / "effects.parquet").num_rows == len(rows)
    for name in ("average", "fraction_restored"):
        assert (out / f"{name}.csv").read_text().count("\n") == parquet.read_table(out / f"{name}.parquet").num_rows + 1
    assert (out / "average.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list((out / "facts").glob("*.png"))) == 3


def test_a_tracing_that_was_cut_goes_on(trace: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    one = ("--workers", "1")  # how many threads serve a fact decides how its products round, and the order of the lines
    assert trace("--limit", "1", *one) == 0
    out = Path("out")
    first = (out / "facts.jsonl").read_text()
    with (out / "facts.jsonl").open("a") as file:
        file.write('{"id": "2", "pro')  # killed while it wrote
    assert trace(*one) == 0
    whole, effects = (out / "facts.jsonl").read_text(), (out / "effects.csv").read_bytes()
    assert whole.startswith(first)
    assert whole.count("\n") == 3
    with monkeypatch.context() as patch:
        patch.setattr(
            "lit_edit.studies.tracing.study.trace_fact", lambda *a, **k: pytest.fail("finished facts are traced again")
        )
        assert trace(*one) == 0
    assert (out / "effects.csv").read_bytes() == effects
    for path in out.glob("*"):
        if path.is_file():
            path.unlink()
    assert trace(*one) == 0  # without a cut
    assert ((out / "facts.jsonl").read_text(), (out / "effects.csv").read_bytes()) == (whole, effects)


def test_facts_by_several_threads_are_those_by_one(
    trace: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, threads = Path("out"), torch.get_num_threads()
    found = []
    for workers in ("1", "2"):
        assert trace("--workers", workers) == 0
        assert torch.get_num_threads() == threads
        found.append([json.loads(line) for line in (out / "facts.jsonl").read_text().splitlines()])
        for path in out.glob("*"):
            if path.is_file():
                path.unlink()
    for one, other in zip(found[0], sorted(found[1], key=lambda fact: fact["id"]), strict=True):
        assert one["id"] == other["id"]
        for kind, rows in one["restored"].items():
            torch.testing.assert_close(torch.tensor(rows), torch.tensor(other["restored"][kind]), rtol=1e-5, atol=1e-7)

    def broken(*args: object, check: Callable[[], object], **more: object) -> None:
        raise FloatingPointError("of one of them")

    monkeypatch.setattr("lit_edit.studies.tracing.study.trace_fact", broken)
    assert trace("--workers", "2") == 1
    assert "error: of one of them" in capsys.readouterr().err
    assert torch.get_num_threads() == threads
    assert not (out / "facts.jsonl").exists() or not (out / "facts.jsonl").read_text()


def test_what_is_finished_is_kept_while_a_long_fact_is_traced(
    trace: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    others = Event()

    def first_is_long(*args: Any, **more: Any) -> Any:
        if args[1].fact.id == "0":
            assert others.wait(60)
            raise FloatingPointError("at last")
        made = trace_fact(*args, **more)
        if args[1].fact.id == "3":
            others.set()
        return made

    monkeypatch.setattr("lit_edit.studies.tracing.study.trace_fact", first_is_long)
    assert trace("--workers", "2") == 1
    kept = [json.loads(line)["id"] for line in Path("out/facts.jsonl").read_text().splitlines()]
    assert kept[:1] == ["2"]  # the second was made while the first was under way


def test_another_model_of_the_same_name_is_not_gone_on_with(
    trace: Callable[..., int], tiny_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    words = ["--model", str(folder), "--limit", "1"]
    assert trace(*words) == 0
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "o_proj" in name)
    save_file(weights | {name: 1.3 * weights[name]}, folder / "model.safetensors", {"format": "pt"})
    assert trace(*words) == 2
    assert "other settings (weights " in capsys.readouterr().err


def test_refused(trace: Callable[..., int], capsys: pytest.CaptureFixture[str], facts: Path) -> None:
    assert trace("--limit", "1") == 0
    assert trace("--limit", "1", "--seed", "3", "--samples", "1") == 2
    assert "other settings (samples 2, now 1; seed 0, now 3)" in capsys.readouterr().err
    other = Path("other.json")
    other.write_text(facts.read_text() + "\n", encoding="utf-8")
    assert trace(data="other.json") == 2
    assert "(data " in capsys.readouterr().err
    Path("out/facts.jsonl").write_text('{"id": "0"}\n')
    assert trace("--limit", "1") == 2
    assert "facts.jsonl:1: damaged (KeyError: 'restored')" in capsys.readouterr().err
    Path("out/settings.json").unlink()
    assert trace("--limit", "1") == 2
    assert "holds results but no settings.json" in capsys.readouterr().err


def test_nothing_to_trace(trace: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    Path("unknown.csv").write_text("prompt,subject,attribute\nRome was,Rome,qqq\n", encoding="utf-8")
    assert trace(data="unknown.csv") == 2
    assert "the model knows none of the 1 facts" in capsys.readouterr().err
    assert trace("--noise", "0") == 2
    assert "noise must be a positive number" in capsys.readouterr().err
    assert trace("--kinds", "mlp", "mlp") == 2
    assert "each once, got mlp, mlp" in capsys.readouterr().err
    assert trace(data="nothing.json") == 2
    assert "nothing.json: no such file" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["trace", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "corrupt the subject of a fact with noise" in " ".join(shown.split())


@pytest.mark.slow
@pytest.mark.model
def test_bfloat16_changes_less_than_the_noise_does() -> None:
    from lit_edit.models import LanguageModel
    from lit_edit.studies.tracing.study import Tracer, TraceSettings

    model, tokenizer = LanguageModel("smollm2-135m").load()
    fact = tokenize_fact(tokenizer, KnownFact("0", "The capital of France is", "France", "Paris", 15))
    settings = TraceSettings(kinds=("mlp",), samples=3)
    exact, fast = (Tracer(ModelAdapter(model), tokenizer, [fact], settings, fast).trace(fact) for fast in (False, True))
    difference = torch.tensor(exact.restored["mlp"]) - torch.tensor(fast.restored["mlp"])
    assert difference.abs().max() < 0.05
