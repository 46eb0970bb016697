"""Asking a model: prompts that fit, the likeliest option, what it says, and what that means."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_edit.ability import measure
from lit_edit.ability.files import TaskData
from lit_edit.ability.measure import (
    NEW_TOKENS,
    ask,
    choose,
    choose_and_say,
    compare_records,
    measure_task,
    measure_tasks,
    parse_option,
)
from lit_edit.ability.metrics import NONE
from lit_edit.ability.tasks import all_tasks
from lit_edit.errors import ArgumentError
from lit_edit.models.adapter import ModelAdapter
from lit_edit.testing import tiny_model, tiny_requests, tiny_tokenizer
from lit_edit.text.tokens import encode

COLA = all_tasks()["cola"]
TOKENIZER = tiny_tokenizer()
PROMPTS = [prompt for request in tiny_requests() for prompt in (request.text, request.paraphrases[0])]


def data(count: int = 6) -> TaskData:
    items = [COLA.item({"sentence": "word " * (n % 4 + 1) + str(n), "label": n % 2}) for n in range(10 + count)]
    return TaskData(COLA, tuple(items[:10]), tuple(items[10:]))


@pytest.fixture(scope="module")
def adapter() -> ModelAdapter:
    return ModelAdapter(tiny_model("llama", max_position_embeddings=512))


def test_prompts_have_the_shots_asked_for_and_the_items_behind_the_reserved_ones() -> None:
    asked = ask(data(), TOKENIZER, shots=2, limit=3)
    assert asked.items == data().items[:3]
    assert asked.prompts[0] == "\n\n".join(
        [f"{data().shots[0].prompt} No", f"{data().shots[1].prompt} Yes", data().items[0].prompt]
    )
    assert (asked.shortened, asked.left_out) == (0, 0)
    assert len(ask(data(), TOKENIZER).prompts) == 6


def test_what_does_not_fit_loses_its_farthest_shots_and_at_last_is_left_out() -> None:
    long = COLA.item({"sentence": "x" * 400, "label": 1})
    some = data()
    some = TaskData(COLA, some.shots, (some.items[0], long))
    short = len(encode(TOKENIZER, COLA.prompt(some.items[0], some.shots[1:3])))
    asked = ask(some, TOKENIZER, shots=3, context=short + NEW_TOKENS)
    assert asked.prompts == (COLA.prompt(some.items[0], some.shots[1:3]),)
    assert (asked.shortened, asked.left_out) == (1, 1)


def test_the_choice_is_that_of_a_naive_loop(adapter: ModelAdapter) -> None:
    expected = []
    for prompt in PROMPTS:
        nlls = []
        for option in ("acceptable", "no", "of tennis"):  # of several tokens and lengths
            start = encode(TOKENIZER, prompt)
            ids = torch.tensor([encode(TOKENIZER, f"{prompt} {option}")])
            with torch.no_grad():
                logp = adapter.model(ids).logits.log_softmax(-1)
            steps = [-logp[0, at - 1, ids[0, at]].item() for at in range(len(start), ids.shape[1])]
            nlls.append(sum(steps) / len(steps))
        expected.append(nlls.index(min(nlls)))
    options = ("acceptable", "no", "of tennis")
    assert choose(adapter, TOKENIZER, PROMPTS, options) == expected
    assert choose_and_say(adapter, TOKENIZER, PROMPTS, options)[0] == expected
    assert len(set(expected)) > 1


def test_options_of_a_token_each_are_read_where_the_continuation_begins(
    adapter: ModelAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("Japan", "chess", "the", "of")
    assert all(len(TOKENIZER.encode(f" {word}", add_special_tokens=False)) == 1 for word in options)
    expected = choose(adapter, TOKENIZER, PROMPTS, options)
    scored: list[Any] = []
    monkeypatch.setattr(measure, "choose", lambda a, t, prompts, o: scored.append(list(prompts)) or [])
    assert choose_and_say(adapter, TOKENIZER, PROMPTS, options)[0] == expected
    assert scored == [[]]
    assert len(set(expected)) > 1


def test_the_shortest_mean_wins_not_the_shortest_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lit_edit.ability.measure.score_continuations",
        lambda adapter, tokenizer, pairs: [SimpleNamespace(nll=nll) for nll in (2.0, 1.0, 3.0, 3.0)],
    )
    nothing: Any = None
    assert choose(nothing, nothing, ["a", "b"], ["x", "y"]) == [1, 0]


def test_what_is_said_is_greedy_whatever_the_batch(adapter: ModelAdapter) -> None:
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([encode(TOKENIZER, prompt)])
        start = ids.shape[1]
        for _ in range(NEW_TOKENS):
            with torch.no_grad():
                best = adapter.model(ids).logits[0, -1].argmax()
            if best == TOKENIZER.eos_token_id:
                break
            ids = torch.cat([ids, best.view(1, 1)], 1)
        expected.append(TOKENIZER.decode(ids[0, start:], skip_special_tokens=True))
    assert choose_and_say(adapter, TOKENIZER, PROMPTS, ("Yes", "No"))[1] == expected
    assert len(set(expected)) > 1


def test_nothing_counts_behind_the_end_token(adapter: ModelAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    end, yes = TOKENIZER.eos_token_id, TOKENIZER.encode(" Yes")
    monkeypatch.setattr(measure, "continue_rows", lambda model, rows, new, look: [(*yes, end, *yes) for _ in rows])
    assert choose_and_say(adapter, TOKENIZER, ["Is it"], ["Yes", "No"])[1] == [" Yes"]


LETTERS = all_tasks()["mmlu"].options
WORDS = ("No", "Yes")


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        (" Yes", WORDS, 1),
        ("\n\nyes.\nNo", WORDS, 1),
        ("The answer is no", WORDS, 0),
        ("**Yes**", WORDS, 1),
        ("Yes or No?", WORDS, NONE),
        ("Yesterday", WORDS, NONE),
        ("Yes_", WORDS, 1),
        ("", WORDS, NONE),
        ("\n", WORDS, NONE),
        ("ja", WORDS, NONE),
        (" untrue", ("False", "True"), NONE),
        ("TRUE, true", ("False", "True"), 1),
        ("a", LETTERS, 0),
        ("b)", LETTERS, 1),
        (" (C) Because", LETTERS, 2),
        ("D", LETTERS, 3),
        ("Answer: B. Paris", LETTERS, 1),
        ("A dog barks", LETTERS, NONE),
        ("It is a", LETTERS, NONE),
        ("(A) or (B)", LETTERS, NONE),
        ("E", LETTERS, NONE),
        ("It's D", LETTERS, 3),
        ("ABCD", LETTERS, NONE),
    ],
)
def test_options_are_recognised(text: str, options: tuple[str, ...], expected: int) -> None:
    assert parse_option(text, options) == expected


def test_a_record_counts_what_was_measured(adapter: ModelAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [" No", "Yes or no", "", "Yes"]
    monkeypatch.setattr("lit_edit.ability.measure.choose_and_say", lambda *args: ([0, 1, 1, 1], texts))
    record = measure_task(adapter, TOKENIZER, data(), limit=4)
    assert record["answers"] == {"gold": [0, 1, 0, 1], "likelihood": [0, 1, 1, 1], "generation": [0, NONE, NONE, 1]}
    assert record["likelihood"]["accuracy"] == 0.75
    assert (record["generation"]["accuracy"], record["generation"]["unparsable"]) == (0.5, 2)
    assert (record["items"], record["shots"], record["majority"]) == (4, 0, 0.5)


def test_several_tasks_say_where_they_are(adapter: ModelAdapter) -> None:
    said: list[str] = []
    records = measure_tasks(adapter, TOKENIZER, [data(2)], generation=False, status=said.append)
    assert said == ["general ability: cola (1 of 1)"]
    assert set(records) == {"cola"}
    assert "generation" not in records["cola"]


def test_a_task_too_long_for_the_model_is_said_so() -> None:
    small = ModelAdapter(tiny_model("llama", max_position_embeddings=16))
    with pytest.raises(ArgumentError, match="no item of cola fits into the model's context of 16 tokens: leave this"):
        measure_task(small, TOKENIZER, data())


def test_records_of_other_items_are_not_compared() -> None:
    one = {"likelihood": {}, "answers": {"gold": [0, 1], "likelihood": [0, 0]}}
    other = {"likelihood": {}, "answers": {"gold": [1, 1], "likelihood": [0, 0]}}
    with pytest.raises(ValueError, match="not of the same items"):
        compare_records(one, other)
    better = {"likelihood": {}, "answers": {"gold": [0, 1], "likelihood": [0, 1]}}
    assert compare_records(one, better)["likelihood"]["accuracy"] == 0.5
