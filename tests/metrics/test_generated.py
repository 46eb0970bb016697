"""What a model writes, against plain transformers and a loop without cache, batches or packing."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from statistics import mean

import pytest
import torch

from lit_edit.data.request import EditRequest, Probe
from lit_edit.metrics import PortabilityAccuracy
from lit_edit.metrics.generated import (
    Answer,
    ByKindResult,
    GenerationResult,
    answer_greedily,
    evaluate_generation,
    evaluate_portability,
    summarise_generation,
    summarise_portability,
)
from lit_edit.metrics.texts import consistency, fit_vectorizer, fluency
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.generation import continue_rows
from lit_edit.testing import tiny_model, tiny_requests, tiny_tokenizer

MODEL = tiny_model()
TOKENIZER = tiny_tokenizer()
TWICE = "Italy is"
REFERENCES = ("Vienna is a city in Austria.", "Vienna lies on the Danube and is its capital.")


@pytest.fixture(scope="module")
def adapter() -> ModelAdapter:
    return ModelAdapter(MODEL)


def greedily(text: str, new: int) -> list[int]:
    """Plain transformers, the whole text anew for each token."""
    ids = TOKENIZER(text)["input_ids"]
    for _ in range(new):
        ids = [*ids, int(MODEL(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[len(ids) - new :] if new else []


def drawn(text: str, length: int, top_k: int, name: str) -> str:
    """As the docstring says: the running sum of the likeliest tokens passes a number that the name alone decides."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
    ids = TOKENIZER(text)["input_ids"]
    numbers = torch.rand(length - len(ids), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for number in numbers.tolist():
        found = torch.softmax(MODEL(torch.tensor([ids])).logits[0, -1].topk(top_k).values.double(), -1)
        order = MODEL(torch.tensor([ids])).logits[0, -1].topk(top_k).indices.tolist()
        sums = [sum(found.tolist()[: place + 1]) for place in range(top_k - 1)]
        ids = [*ids, order[sum(passed <= number for passed in sums)]]
    return TOKENIZER.decode(ids, skip_special_tokens=True)


def requests() -> list[EditRequest]:
    first, second, third = tiny_requests()[:3]
    return [
        replace(first, generation=(TWICE, TWICE, "The old town of Vienna"), references=REFERENCES),
        replace(second, generation=("Marie Curie was born in a town",)),
        replace(third, generation=(), paraphrases=()),
    ]


def test_texts_are_those_of_a_naive_loop(adapter: ModelAdapter) -> None:
    vectorizer = fit_vectorizer([REFERENCES])
    found = evaluate_generation(adapter, TOKENIZER, requests(), seed=3, top_k=4, length=24, vectorizer=vectorizer)
    for request, result in zip(requests(), found, strict=True):
        expected = tuple(drawn(p, 24, 4, f"3|{request.id}|{n}") for n, p in enumerate(request.generation))
        assert result.texts == expected
        assert result.fluency == (fluency(expected) if expected else None)
    assert found[0].texts[0] != found[0].texts[1]  # one prompt, two draws
    assert found[0].consistency == consistency(found[0].texts, REFERENCES, vectorizer)
    assert found[1].consistency is found[2].consistency is None
    summary = summarise_generation(found)
    assert summary["fluency"] == pytest.approx(mean([found[0].fluency, found[1].fluency]))
    assert summary["consistency"] == found[0].consistency


def test_a_text_does_not_depend_on_the_others(adapter: ModelAdapter) -> None:
    whole = evaluate_generation(adapter, TOKENIZER, requests(), length=20)
    alone = evaluate_generation(adapter, TOKENIZER, requests()[:1], length=20, batch_rows=1)
    assert alone[0].texts == whole[0].texts
    first = evaluate_generation(adapter, TOKENIZER, list(reversed(requests())), length=20, max_prompts=1)
    assert first[2].texts == whole[0].texts[:1]
    other = evaluate_generation(adapter, TOKENIZER, requests()[:1], length=20, seed=1)
    assert other[0].texts != whole[0].texts


def test_answers_are_greedy_and_have_as_many_tokens_as_the_object(adapter: ModelAdapter) -> None:
    prompt = "The capital of Italy is"
    right = EditRequest("right", "The capital of {} is", "Italy", "Vienna", paraphrases=("Mount Fuji is in", prompt))
    pairs = [(prompt, "Vienna"), ("Mount Fuji is in", "Jules Verne"), (prompt, "Vienna")]
    answers = answer_greedily(adapter, TOKENIZER, pairs)
    for (text, target), answer in zip(pairs, answers, strict=True):
        wanted = TOKENIZER(f" {target}")["input_ids"]
        tokens = greedily(text, len(wanted))
        assert answer.hits == tuple(a == b for a, b in zip(tokens, wanted, strict=True))
        assert answer.text == TOKENIZER.decode(tokens).strip()
    (found,) = evaluate_generation(adapter, TOKENIZER, [right])
    assert found.efficacy == (answers[0],)
    assert [a.text for a in found.generalization] == [
        TOKENIZER.decode(greedily(p, len(TOKENIZER(" Vienna")["input_ids"]))).strip() for p in right.paraphrases
    ]


def test_a_model_that_says_the_object_is_right_altogether() -> None:
    """A head that prefers one token: what it says is known."""
    model = tiny_model()
    token = TOKENIZER(" Vienna")["input_ids"][0]
    adapter = ModelAdapter(model)
    ids = adapter.go_on(torch.tensor([[5, 6]]), 3, lambda logits, step: torch.full((1, 1), token))
    assert ids.tolist() == [[5, 6, token, token, token]]


def test_the_summary_of_answers_by_hand() -> None:
    results = [
        GenerationResult(
            "a",
            (),
            2.0,
            0.25,
            (Answer("the Hague.", "The Hague", (True, True, False)),),
            (Answer("x", "The Hague", (False, False, False)), Answer("The Hague", "The Hague", (True, True, True))),
        ),
        GenerationResult("b", (), 4.0, None, (Answer("Rome", "Rome", (True,)),), ()),
        GenerationResult("c", (), None, None, (Answer("Oslo", "Bern", (False,)),), ()),
    ]
    assert summarise_generation(results) == {
        "fluency": 3.0,
        "consistency": 0.25,
        "generation": {
            "efficacy": {
                "token_accuracy": pytest.approx((2 / 3 + 1 + 0) / 3),
                "accuracy": pytest.approx(1 / 3),
                "exact_match": pytest.approx(2 / 3),
            },
            "generalization": {"token_accuracy": 0.5, "accuracy": 0.5, "exact_match": 0.5},
        },
    }
    for result in results:
        assert GenerationResult.from_state(json.loads(json.dumps(result.as_state()))) == result
    assert summarise_generation([])["fluency"] is None


def test_portability_and_locality_by_kind(adapter: ModelAdapter) -> None:
    edits = [
        replace(
            tiny_requests()[0],
            portability={"alias": (Probe("Rome is in", "Chile"), Probe("Kyoto is", "Japan")), "one_hop": ()},
            locality={"relation": (Probe("The capital of Spain is", "Madrid"),)},
        ),
        tiny_requests()[1],
        replace(tiny_requests()[2], portability={"alias": (Probe("Chopin is", "Polish"),)}),
    ]

    def hits(prompt: str, answer: str) -> list[bool]:
        ids, wanted = TOKENIZER(prompt)["input_ids"], TOKENIZER(f" {answer}")["input_ids"]
        logits = MODEL(torch.tensor([ids + wanted])).logits[0, len(ids) - 1 : -1]
        return [a == b for a, b in zip(logits.argmax(-1).tolist(), wanted, strict=True)]

    found = evaluate_portability(adapter, TOKENIZER, edits)
    assert found[0].portability == {"alias": (tuple(hits("Rome is in", "Chile")), tuple(hits("Kyoto is", "Japan")))}
    assert found[0].locality == {"relation": (tuple(hits("The capital of Spain is", "Madrid")),)}
    assert (found[1].portability, found[1].locality) == ({}, {})
    changed = ModelAdapter(MODEL).with_weights({adapter.weight_name(2): 3 * adapter.weight(2)})
    before = {result.id: result for result in found}
    after = summarise_portability(evaluate_portability(changed, TOKENIZER, edits), before)
    same = summarise_portability(found, before)
    assert same["locality_by_kind"]["relation"]["agreement"] == 1.0
    assert 0 <= after["locality_by_kind"]["relation"]["agreement"] <= 1.0
    assert set(after["portability"]) == {"alias"}
    assert summarise_portability(found[1:2]) == {}


def test_portability_by_hand() -> None:
    results = [
        ByKindResult("a", {"alias": ((True, False), (True, True))}, {"near": ((True,),)}, {"near": ((5, 6),)}),
        ByKindResult("b", {"alias": ((False,),), "hop": ((True,),)}, {"near": ((False,),)}, {"near": ((7,),)}),
    ]
    before = {"a": ByKindResult("a", {}, {}, {"near": ((5, 9),)})}
    assert summarise_portability(results, before) == {
        "portability": {"alias": 0.375, "hop": 1.0},
        "locality_by_kind": {"near": {"token_accuracy": 0.5, "agreement": 0.5}},
    }
    metric = PortabilityAccuracy(["alias", "hop", "never"])
    for result in results:
        metric.update({kind: [torch.tensor(row) for row in rows] for kind, rows in result.portability.items()})
    assert metric.compute() == {"alias": 0.375, "hop": 1.0}


def test_rows_of_different_lengths_are_continued_as_they_would_be_alone(adapter: ModelAdapter) -> None:
    texts = ["The capital of", "A", "Mount Fuji is located in", "The capital of"]
    rows = [TOKENIZER(text)["input_ids"] for text in texts]
    told: list[tuple[int, int]] = []
    found = continue_rows(adapter, rows, [4, 2, 0, 1], batch_rows=2, progress=lambda *at: told.append(at))
    assert [list(row) for row in found] == [greedily(t, n) for t, n in zip(texts, [4, 2, 0, 1], strict=True)]
    assert told[-1] == (3, 3)
    assert continue_rows(adapter, [], []) == []


def test_what_cannot_be_continued_is_refused(adapter: ModelAdapter) -> None:
    with pytest.raises(ValueError, match="for each of 1 rows"):
        continue_rows(adapter, [[5]], [1, 2])
    with pytest.raises(ValueError, match="for each of 1 rows"):
        continue_rows(adapter, [[5]], [1], top_k=2)
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        continue_rows(adapter, [[5]], [1], top_k=0)


def test_a_collapsed_model_still_has_a_fluency(adapter: ModelAdapter) -> None:
    nan = adapter.with_weights({adapter.weight_name(1): torch.full_like(adapter.weight(1), float("nan"))})
    (found,) = evaluate_generation(nan, TOKENIZER, requests()[:1], length=20)
    (sound,) = evaluate_generation(adapter, TOKENIZER, requests()[:1], length=20)
    assert found.fluency is not None
    assert sound.fluency is not None
    assert 0 <= found.fluency < sound.fluency
