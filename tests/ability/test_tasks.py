"""Prompts, labels and files of the few-shot tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from lit_edit.ability.files import load_task
from lit_edit.ability.tasks import RESERVED, Item, all_tasks, digest, find_tasks
from lit_edit.data.request import DataError

PAIR = {"sentence1": "A cat sleeps. ", "sentence2": "An animal sleeps."}
EXAM = {"question": "What is 2 + 2?", "choices": ["1", "2", "3", "4"], "answer": 3}


@pytest.mark.parametrize(
    ("name", "record", "prompt", "answer"),
    [
        ("sst2", {"sentence": "a fine film . ", "label": 1}, "Review :a fine film .\nSentiment :", "positive"),
        (
            "mrpc",
            {**PAIR, "label": 0},
            "Are the sentences paraphrases of each other.\nSentence 1: A cat sleeps.\nSentence 2: An animal sleeps.\n"
            "Answer:",
            "No",
        ),
        (
            "cola",
            {"sentence": "Cat the sleeps.", "label": 0},
            "Is this sentence linguistically acceptable?\nSentence: Cat the sleeps.\nAnswer:",
            "No",
        ),
        ("rte", {**PAIR, "label": 0}, "A cat sleeps.\nquestion: An animal sleeps. True or False?\nanswer:", "True"),
        (
            "nli",
            {**PAIR, "label": "not_entailment"},
            "A cat sleeps. entails the An animal sleeps. True or False? Answer:",
            "False",
        ),
        ("mmlu", EXAM, "Question: What is 2 + 2?\n(A) 1\n(B) 2\n(C) 3\n(D) 4\nAnswer:", "D"),
    ],
)
def test_prompt_and_answer_of_each_task(name: str, record: dict[str, Any], prompt: str, answer: str) -> None:
    task = all_tasks()[name]
    item = task.item(record)
    assert item.prompt == prompt
    assert task.options[item.gold] == answer


def test_shots_stand_in_front_with_their_answers() -> None:
    task = all_tasks()["sst2"]
    shots = [Item("Review :good\nSentiment :", 1), Item("Review :bad\nSentiment :", 0)]
    assert task.prompt(Item("Review :so so\nSentiment :", 0), shots) == (
        "Review :good\nSentiment : positive\n\nReview :bad\nSentiment : negative\n\nReview :so so\nSentiment :"
    )


@pytest.mark.parametrize("label", [0, "0", "entailment", "Entailment"])
def test_entailment_is_true_in_rte_and_nli(label: Any) -> None:
    for name in ("rte", "nli"):
        task = all_tasks()[name]
        assert task.options[task.item({**PAIR, "label": label}).gold] == "True"


def test_letters_are_answers_of_mmlu_too() -> None:
    assert all_tasks()["mmlu"].item({**EXAM, "answer": "c"}).gold == 2


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("sst2", ["a"], "expected a record with fields, got list"),
        ("sst2", {"label": 1}, "missing field sentence; sst2 needs sentence, label"),
        ("sst2", {"sentence": 3, "label": 1}, "sentence must be text, got int"),
        ("sst2", {"sentence": " ", "label": 1}, "sentence is empty"),
        ("sst2", {"sentence": "x"}, "missing field label, the answer"),
        ("sst2", {"sentence": "x", "label": -1}, r"label -1 is none of sst2's \(0 = negative, 1 = positive"),
        ("sst2", {"sentence": "x", "label": True}, "label True is none of"),
        ("rte", {**PAIR, "label": 2}, "label 2 is none of rte's .0 = True, 1 = False"),
        ("mmlu", {**EXAM, "answer": 4}, "answer 4 is none of mmlu's"),
        ("mmlu", {**EXAM, "choices": ["1", "2"]}, "choices must be a list of 4 texts, got"),
        ("mmlu", {**EXAM, "choices": ["1", "2", "3", ""]}, "a choice is empty"),
    ],
)
def test_broken_records_are_named(name: str, record: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        all_tasks()[name].item(record)


def test_names_of_tasks_are_checked() -> None:
    for names, message in (([], "at least one"), ("rte", "must be a list"), (["rtee"], "no task 'rtee'; there are")):
        with pytest.raises(ValueError, match=message):
            find_tasks(names)
    with pytest.raises(ValueError, match="named twice"):
        find_tasks(["rte", "rte"])


# ---- files --------------------------------------------------------------------------------------------------------


def write(folder: Path, name: str, records: list[Any], kind: str = "jsonl") -> Path:
    path = folder / f"{name}.{kind}"
    text = "".join(json.dumps(record) + "\n" for record in records) if kind == "jsonl" else json.dumps(records)
    path.write_text(text)
    return path


def reviews(count: int) -> list[dict[str, Any]]:
    return [{"sentence": f"film {number}", "label": number % 2} for number in range(count)]


@pytest.mark.parametrize(("name", "kind"), [("sst2", "jsonl"), ("glue_sst2", "json")])
def test_the_first_ten_are_shots_and_never_measured(tmp_path: Path, name: str, kind: str) -> None:
    write(tmp_path, name, reviews(13), kind)
    data = load_task(all_tasks()["sst2"], tmp_path)
    assert [item.prompt for item in data.shots] == [f"Review :film {n}\nSentiment :" for n in range(RESERVED)]
    assert [item.prompt for item in data.items] == [f"Review :film {n}\nSentiment :" for n in (10, 11, 12)]
    assert [item.gold for item in data.items] == [0, 1, 0]


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    task = all_tasks()["sst2"]
    with pytest.raises(DataError, match="there is no such folder"):
        load_task(task, tmp_path / "gone")
    with pytest.raises(DataError, match=r"no file for task sst2; expected sst2.json, .jsonl or .csv"):
        load_task(task, tmp_path)
    path = write(tmp_path, "sst2", reviews(10))
    with pytest.raises(DataError, match=r"10 items; sst2 needs more than 10"):
        load_task(task, tmp_path)
    write(tmp_path, "sst2", [*reviews(11), {"sentence": "x"}])
    with pytest.raises(DataError, match=rf"{path}:12: missing field label"):
        load_task(task, tmp_path)
    path.write_text('{"sentence": \n')
    with pytest.raises(DataError, match=rf"{path}:1: bad JSON"):
        load_task(task, tmp_path)
    write(tmp_path, "glue_sst2", reviews(11), "json")
    with pytest.raises(DataError, match=r"two files for task sst2: sst2\.jsonl and glue_sst2\.json"):
        load_task(task, tmp_path)


@pytest.mark.parametrize("name", all_tasks())
def test_the_real_files_are_read_and_balanced(shared_data: Path, name: str) -> None:
    data = load_task(all_tasks()[name], shared_data)
    assert (len(data.shots), len(data.items)) == (10, 200)
    count = [sum(item.gold == gold for item in data.items) for gold in range(len(data.task.options))]
    assert max(count) - min(count) <= 1


@pytest.mark.parametrize("name", ["sst2", "mrpc", "cola", "rte"])
def test_inverted_files_are_refused(shared_data: Path, tmp_path: Path, name: str) -> None:
    records = json.loads((shared_data / f"glue_{name}.json").read_text())
    task = all_tasks()[name]
    known = {digest([record[field] for field in task.fields]) for record in records}
    assert set(task.anchors) <= known
    write(tmp_path, name, [{**record, "label": 1 - record["label"]} for record in records], "json")
    with pytest.raises(
        DataError, match=rf"{name}.json:\d+: label . means .* the file's labels are the wrong way round"
    ):
        load_task(task, tmp_path)


def test_a_known_item_of_rte_has_its_label_the_right_way_round(shared_data: Path) -> None:
    """The town is home to a tribe of Pakistan's, so that it is in Pakistan is entailed: GLUE's label 0, hence True."""
    task = all_tasks()["rte"]
    data = load_task(task, shared_data)
    everything = [*data.shots, *data.items]
    (first,) = [item for item in everything if "question: The Raisani tribe resides in Pakistan." in item.prompt]
    (other,) = [item for item in everything if "question: The Dalai Lama has been living in exile since" in item.prompt]
    assert (task.options[first.gold], task.options[other.gold]) == ("True", "False")


# ---- hub ----------------------------------------------------------------------------------------------------------


def from_hub(monkeypatch: pytest.MonkeyPatch, labels: list[int], names: list[str]) -> list[Any]:
    asked: list[Any] = []
    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    rows = {"sentence": [f"film {n}" for n in range(len(labels))], "label": labels}

    def load(*args: Any, **options: Any) -> datasets.Dataset:
        asked.append((args, options))
        return datasets.Dataset.from_dict(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_the_hub_gives_shuffled_labels_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = from_hub(monkeypatch, [0] * 20 + [1] * 8, ["negative", "positive"])
    data = load_task(all_tasks()["sst2"])
    assert asked == [(("nyu-mll/glue", "sst2"), {"split": "validation"})]
    golds = [item.gold for item in (*data.shots, *data.items)]
    assert golds == [0, 1] * 8 + [0] * 12
    assert data == load_task(all_tasks()["sst2"])
    assert [item.prompt for item in data.shots[::2]] != [f"Review :film {n}\nSentiment :" for n in range(5)]


def test_a_hub_set_with_other_label_names_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from_hub(monkeypatch, [0, 1] * 10, ["positive", "negative"])
    with pytest.raises(DataError, match="calls its labels positive, negative; expected negative, positive"):
        load_task(all_tasks()["sst2"])


def test_without_a_hub_it_is_said_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **options: Any) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"cannot be loaded: offline \(without the hub: give a folder with rte.json\)"):
        load_task(all_tasks()["rte"])
