"""The callback that measures general ability along a stream."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lit_edit.callbacks import Ability, RunFolder

from lit_edit.ability.course import ability_metrics, summarise_ability
from lit_edit.ability.files import load_task
from lit_edit.ability.measure import measure_tasks
from lit_edit.ability.tasks import all_tasks
from lit_edit.cli.main import main
from lit_edit.data.request import DataError
from lit_edit.models.adapter import ModelAdapter
from lit_edit.stream.edit_stream import EditStream
from lit_edit.testing import tiny_model, tiny_tokenizer
from tests.streams import make_data, make_stream, make_trainer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "tasks"
    made.mkdir()
    for name, text in (("cola", "Is it {}?"), ("sst2", "film {}")):
        rows = [json.dumps({"sentence": text.format(n), "label": n % 2}) for n in range(16)]
        (made / f"{name}.jsonl").write_text("\n".join(rows))
    return made


def ability(folder: Path, **options: Any) -> Ability:
    return Ability(**{"folder": str(folder), "tasks": ["cola", "sst2"], "limit": 4, "every": 2, **options})


def fit(place: Path, callbacks: list[Any], count: int = 3, **options: Any) -> EditStream:
    stream = make_stream()
    make_trainer(place, callbacks, **{k: v for k, v in options.items() if k != "ckpt_path"}).fit(
        stream, make_data(count), ckpt_path=options.get("ckpt_path"), weights_only=True
    )
    return stream


def test_a_stream_is_measured_before_on_the_way_and_at_the_end(tmp_path: Path, folder: Path) -> None:
    callback = ability(folder)
    stream = fit(tmp_path, [RunFolder(), callback], 5)  # behind RunFolder: the order does not matter
    assert [point["edits"] for point in callback.history] == [0, 2, 4, 5]

    data = [load_task(all_tasks()[name], folder) for name in ("cola", "sst2")]
    base = ModelAdapter(tiny_model("llama"))
    assert callback.history[0]["tasks"] == measure_tasks(base, tiny_tokenizer(), data, 0, 4)
    assert callback.history[-1]["tasks"] == measure_tasks(stream.adapter, tiny_tokenizer(), data, 0, 4)

    summary = json.loads((tmp_path / "summary.json").read_text())["ability"]
    assert summary["edits"] == 5
    assert set(summary["base"]) == set(summary["final"]) == set(summary["change"]) == {"cola", "sst2"}
    assert "answers" not in summary["final"]["cola"]
    first, last = (summary[stage]["cola"]["likelihood"]["accuracy"] for stage in ("base", "final"))
    assert summary["change"]["cola"]["likelihood"]["accuracy"] == pytest.approx(last - first)
    assert summary["final"]["cola"]["generation"]["unparsable"] <= 4

    with (tmp_path / "metrics.csv").open() as file:
        rows = {row["step"]: row for row in csv.DictReader(file) if row["ability/cola/accuracy"]}
    assert list(rows) == ["0", "2", "4", "5"]
    assert float(rows["5"]["ability/cola/accuracy"]) == last
    assert {"ability/sst2/f1", "ability/sst2/mcc", "ability/sst2/generated_f1", "ability/sst2/unparsable"} <= set(
        rows["0"]
    )


def test_by_default_before_and_at_the_end_alone(tmp_path: Path, folder: Path) -> None:
    callback = ability(folder, every=0, generation=False, tasks=["cola"])
    fit(tmp_path, [callback], max_steps=2)
    assert [point["edits"] for point in callback.history] == [0, 2]
    assert "generation" not in callback.history[0]["tasks"]["cola"]


class TakesOut(Callback):
    """Takes an edit out when the stream has come to its end."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.session.undo([1], "a test", origin="guard")


def test_the_end_is_measured_without_edits_that_were_taken_out(tmp_path: Path, folder: Path) -> None:
    callback = ability(folder, every=1)
    stream = fit(tmp_path, [callback, TakesOut()], 2)
    assert len(stream.ledger) == 1
    assert [point["edits"] for point in callback.history] == [0, 1, 2]
    data = [load_task(all_tasks()[name], folder) for name in ("cola", "sst2")]
    assert callback.history[-1]["tasks"] == measure_tasks(stream.adapter, tiny_tokenizer(), data, 0, 4)


class StopAfter(Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if pl_module.edits_made == 3:
            raise RuntimeError("power cut")


@pytest.mark.parametrize(("limit", "items"), [(4, "same"), (3, "same"), (4, "other")])
def test_results_survive_a_cut_and_a_resume(
    tmp_path: Path, folder: Path, limit: int, items: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def callbacks(limit: int = 4) -> list[Any]:
        checkpoints = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=1, save_top_k=-1)
        return [ability(folder, tasks=["cola"], limit=limit, generation=False), checkpoints]

    whole = callbacks(limit)[:1]
    fit(tmp_path / "whole", whole, 4)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path / "cut", [*callbacks(), StopAfter()], 4)
    if items == "other":
        path = folder / "cola.jsonl"
        path.write_text(path.read_text().replace("Is it", "Was it"))
        whole = callbacks()[:1]
        fit(tmp_path / "other", whole, 4)
    again = callbacks(limit)
    stream = fit(tmp_path / "cut", again, 4, ckpt_path=str(tmp_path / "checkpoints" / "epoch=0-step=2.ckpt"))
    if (limit, items) == (4, "same"):
        assert again[0].history == whole[0].history
        assert stream.summary()["ability"]["edits"] == 4
        last = tmp_path / "checkpoints" / "epoch=0-step=4.ckpt"
        for_nothing = callbacks()
        monkeypatch.setattr("lit_edit.callbacks.ability.measure_tasks", None)  # the checkpoint holds the end
        nothing_left = fit(tmp_path / "cut", for_nothing, 4, ckpt_path=str(last))
        assert nothing_left.summary()["ability"] == stream.summary()["ability"]
    else:  # what was measured in another way is not compared with
        assert again[0].history == [whole[0].history[0], whole[0].history[-1]]


def test_a_broken_file_is_named_before_the_model_is_loaded(tmp_path: Path, folder: Path) -> None:
    (folder / "cola.jsonl").write_text('{"sentence": "It is."}\n')
    with pytest.raises(DataError, match=r"cola.jsonl:1: missing field label"):
        fit(tmp_path, [ability(folder)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": -1}, "Ability: every must be at least 0, got -1"),
        ({"limit": -1}, "Ability: limit must be at least 0"),
        ({"shots": -1}, "Ability: shots must be at least 0"),
        ({"shots": 11}, "Ability: shots must be at most 10, the items that are kept for it, got 11"),
        ({"tasks": ["glue"]}, "Ability: tasks: there is no task 'glue'; there are sst2, mrpc"),
        ({"tasks": []}, "Ability: tasks must be a list"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ability(**options)


def test_all_tasks_are_measured_unless_named() -> None:
    assert [task.name for task in Ability().tasks] == ["sst2", "mrpc", "cola", "rte", "nli", "mmlu"]


def record(right: int, generation: bool = True) -> dict[str, Any]:
    scores = {"accuracy": right / 4, "f1": 0.25, "mcc": -0.5}
    said = {"generation": {**scores, "unparsable": 3}} if generation else {}
    answers = {way: [0] * right + [1] * (4 - right) for way in ("likelihood", "generation")}
    return {"likelihood": scores, **said, "answers": {"gold": [0] * 4, **answers}}


def test_names_of_what_is_logged() -> None:
    assert ability_metrics({"rte": record(3), "nli": record(2, False)}) == {
        "ability/rte/accuracy": 0.75,
        "ability/rte/f1": 0.25,
        "ability/rte/mcc": -0.5,
        "ability/rte/generated_accuracy": 0.75,
        "ability/rte/generated_f1": 0.25,
        "ability/rte/generated_mcc": -0.5,
        "ability/rte/unparsable": 3,
        "ability/nli/accuracy": 0.5,
        "ability/nli/f1": 0.25,
        "ability/nli/mcc": -0.5,
    }


def test_the_summary_goes_from_the_first_point_to_the_last() -> None:
    points = [{"edits": edits, "tasks": {"rte": record(right)}} for edits, right in ((0, 4), (5, 3), (9, 2))]
    summary = summarise_ability(points)
    assert [point["edits"] for point in summary["points"]] == [0, 5, 9]
    assert summary["change"]["rte"]["likelihood"]["accuracy"] == -0.5


def test_the_config_that_ships_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "counterfact", "--config", "callbacks/ability", "--data.path=x", "--print_config"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    at = text.index("class_path: lit_edit.callbacks.Ability")
    assert "every: 100" in text[at : at + 400]


def test_it_can_be_added_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    added = ["--trainer.callbacks+=lit_edit.callbacks.Ability", "--trainer.callbacks.folder=tasks"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "quickstart", *added, "--trainer.callbacks.every=50", "--print_config"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    at = text.index("class_path: lit_edit.callbacks.Ability")
    assert "folder: tasks" in text[at : at + 200]
    assert "every: 50" in text[at : at + 300]
