"""``lit-edit ability``: the model of a run as it was after some of its edits, and what it scores then."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_edit.ability.measure import measure_task
from lit_edit.cli import ability as command
from lit_edit.cli.main import main
from lit_edit.ledger.journal import Journal
from lit_edit.runs.files import journal_path
from lit_edit.runs.folder import RunError, open_as_of, read_history, records_until

METHODS = {
    "d4s": ["--model.editor.init_args.layers=[1,2]"],
    "memit": ["--model.editor.init_args.layers=[1,2]"],
    "ft": ["--model.editor.init_args.layers=[1]", "--model.editor.init_args.steps=3"],
    "grace": ["--model.editor.init_args.layer=1", "--model.editor.init_args.steps=3"],
}
QUICK = ["d4s", "grace", *(pytest.param(name, marks=pytest.mark.slow) for name in ("memit", "ft"))]
LOCATED = [
    "--model.editor.init_args.target.steps=3",
    "--model.editor.init_args.contexts=plain",
    "--model.statistics.tokens=0",
]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache for the runs and for what is opened of them: edits are replayed with the statistics of their making."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_EDIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for name, text in (("cola", "Is it {}?"), ("sst2", "film {}")):
        rows = [json.dumps({"sentence": text.format(n), "label": n % 2}) for n in range(18)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def make(tiny_folder: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Make a run of three edits that measures the tasks after each of them."""
    made: dict[str, Path] = {}

    def make_run(method: str) -> Path:
        if method not in made:
            folder = tmp_path_factory.mktemp("runs")
            args = ["--config", "quickstart", "--config", f"method/{method}", *METHODS[method]]
            args += [] if method in ("ft", "grace") else LOCATED
            args += [f"--model.language_model.name={tiny_folder}", "--data.limit=3", "--trainer.accelerator=cpu"]
            args += ["--trainer.callbacks+=lit_edit.callbacks.Ability", f"--trainer.callbacks.folder={tasks}"]
            args += ["--trainer.callbacks.tasks=[cola,sst2]", "--trainer.callbacks.every=1"]
            args += ["--trainer.callbacks.limit=5", f"--runs_dir={folder}", "--run_name=x"]
            assert main(["fit", *args]) == 0
            made[method] = folder / "x"
        return made[method]

    return make_run


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def ability(run: Path, tasks: Path, out: Path, *more: str) -> int:
    words = ["--run", str(run), "--folder", str(tasks), "--tasks", "cola", "sst2", "--limit", "5", "--out", str(out)]
    return main(["ability", *words, *more])


def probabilities(adapter: Any, tokenizer: Any) -> Any:
    ids = torch.tensor([tokenizer("The mother tongue of Danielle Darrieux is")["input_ids"]])
    with torch.no_grad(), adapter.patched():
        return adapter.model(input_ids=ids).logits


@pytest.mark.parametrize("method", QUICK)
def test_afterwards_is_what_was_measured_along_the_stream(
    method: str, make: Any, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(method)
    before = digests(run)
    assert ability(run, tasks, tmp_path / "out", "--at", "3", "0", "1") == 0
    assert digests(run) == before  # a look changes nothing
    along = {point["edits"]: point for point in json.loads((run / "summary.json").read_text())["ability"]["points"]}
    found = json.loads((tmp_path / "out" / "ability.json").read_text())
    assert [point["edits"] for point in found["points"]] == [0, 1, 3]
    assert found["points"] == [along[number] for number in (0, 1, 3)]
    said = capsys.readouterr().out
    assert "before" in said
    assert "after 1" in said
    assert "change, 95 %" in said


@pytest.mark.parametrize("method", QUICK)
def test_the_model_is_that_of_a_stream_that_ended_there(method: str, make: Any) -> None:
    run, found = make(method), []
    for number in (0, 1, 2, 3):
        with open_as_of(run, number) as opened:
            found.append(probabilities(opened.stream.adapter, opened.stream.tokenizer))
            assert len(opened.stream.ledger) == number
    with open_as_of(run, 2) as opened:
        assert probabilities(opened.stream.adapter, opened.stream.tokenizer).equal(found[2])
    assert not any(one.equal(other) for one, other in pairwise(found)) or method == "grace"


def test_what_is_measured_is_not_measured_again(
    make: Any, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = make("d4s"), tmp_path / "out"
    assert ability(run, tasks, out, "--at", "0", "2") == 0
    opened: list[int] = []
    real = open_as_of
    monkeypatch.setattr(
        "lit_edit.runs.folder.open_as_of", lambda folder, edits: opened.append(edits) or real(folder, edits)
    )
    assert ability(run, tasks, out, "--at", "0", "1", "2") == 0
    assert opened == [1]
    assert main(["undo", "--run", str(run), "--edit", "1"]) == 0
    assert ability(run, tasks, out, "--at", "2", "3") == 0
    assert opened == [1, 3]  # 2 is as it was: the first edit was taken out later
    found = json.loads((out / "ability.json").read_text())
    assert [point["edits"] for point in found["points"]] == [0, 1, 2, 3]  # also what was measured earlier
    assert main(["redo", "--run", str(run), "--edit", "1"]) == 0


def test_a_task_can_be_added_and_a_cut_loses_one_task_at_most(
    make: Any, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out, measured = make("memit"), tmp_path / "out", []
    real = measure_task

    def measure(adapter: Any, tokenizer: Any, task: Any, *more: Any) -> Any:
        if task.task.name == "sst2" and not measured:
            measured.append("cut")
            raise KeyboardInterrupt
        measured.append(task.task.name)
        return real(adapter, tokenizer, task, *more)

    assert ability(run, tasks, out, "--at", "0", "--tasks", "cola") == 0
    monkeypatch.setattr("lit_edit.ability.measure.measure_task", measure)
    with suppress(KeyboardInterrupt):
        ability(run, tasks, out, "--at", "0", "3")
    assert ability(run, tasks, out, "--at", "0", "3") == 0
    assert measured == ["cut", "sst2", "cola", "sst2"]
    points = json.loads((out / "ability.json").read_text())["points"]
    assert [(point["edits"], "ability/sst2/accuracy" in point) for point in points] == [(0, True), (3, True)]


def test_records_that_lead_to_an_edit(make: Any) -> None:
    run = make("memit")
    history, records = read_history(run), Journal(journal_path(run), writable=False).records
    kinds = [record["kind"] for record in records]
    assert kinds == ["begin", "edit", "edit", "edit", "end"]
    assert [records_until(history, records, number) for number in range(4)] == [1, 2, 3, 4]
    with pytest.raises(RunError, match="has made 3 edits, not 4"):
        records_until(history, records, 4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--at", "4"], "--at 4: .* has made 3 edits"),
        (["--at", "-1"], "--at -1: .* has made 3 edits"),
        (["--shots", "11"], "--shots must be 0 to 10, .* got 11"),
        (["--folder", "none"], "--task_files none: there is no such folder"),
        (["--run", "none"], "no run folder none"),
    ],
)
def test_wrong_arguments_are_named(
    more: list[str], message: str, make: Any, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ability(make("memit"), tasks, tmp_path / "out", *more) != 0
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_other_settings_need_another_folder(
    make: Any, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ability(make("memit"), tasks, tmp_path / "out", "--at", "0") == 0
    assert ability(make("memit"), tasks, tmp_path / "out", "--at", "0", "--likelihood") == 2
    assert "generation True, now False" in capsys.readouterr().err


def test_a_table_has_the_change_from_the_first_to_the_last() -> None:
    def record(right: int) -> dict[str, Any]:
        gold = [0, 1, 0, 1]
        chosen = [g if n < right else 1 - g for n, g in enumerate(gold)]
        return {
            "likelihood": {"accuracy": right / 4, "f1": 0.0, "mcc": 0.0},
            "answers": {"gold": gold, "likelihood": chosen},
        }

    table = command.ability_table([{"edits": n, "tasks": {"rte": record(right)}} for n, right in ((0, 1), (50, 3))])
    assert [column.header for column in table.columns] == ["task", "before", "after 50", "change, 95 %"]
    assert [next(iter(column.cells)) for column in table.columns][:3] == ["rte", "0.250", "0.750"]
    assert next(iter(table.columns[3].cells)).startswith("+0.500 (")
