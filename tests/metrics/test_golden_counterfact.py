"""Ten real CounterFact records on a tiny model: every number against plain transformers, one prompt at a time."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import pytest
import torch

from lit_edit.data.request import EditRequest
from lit_edit.data.sources import load_requests
from lit_edit.metrics.evaluation import evaluate_edits, measure_perplexity, summarise
from lit_edit.metrics.generated import evaluate_generation, summarise_generation
from lit_edit.metrics.published import as_published
from lit_edit.models.adapter import ModelAdapter
from lit_edit.testing import tiny_model, tiny_tokenizer

MODEL, TOKENIZER = tiny_model(), tiny_tokenizer()

# By the naive loop below; kept so that a change of both sides shows.
GOLDEN = {
    "ES": 60.0,
    "PS": 60.0,
    "NS": 30.0,
    "EM": 0.0214620,
    "PM": 0.0178675,
    "NM": -0.0107898,
    "S": 45.0,
}


@pytest.fixture(scope="module")
def records(shared_data: Path) -> list[dict[str, Any]]:
    return json.loads((shared_data / "counterfact_2000.json").read_text("utf-8"))[:10]


@pytest.fixture(scope="module")
def requests(shared_data: Path) -> list[EditRequest]:
    found, _ = load_requests("counterfact_flat", str(shared_data / "counterfact_2000.json"), limit=10)
    return [replace(request, generation=(f"{request.subject} is",)) for request in found]


def scored(prompt: str, target: str) -> tuple[float, list[bool]]:
    """Mean nll of the target's tokens, and which of them are first choices."""
    before, after = TOKENIZER(prompt)["input_ids"], TOKENIZER(" " + target)["input_ids"]
    logits = MODEL(torch.tensor([before + after])).logits[0].double()
    total, hits = 0.0, []
    for place, token in enumerate(after, len(before) - 1):
        total -= math.log(math.exp(logits[place, token]) / sum(math.exp(value) for value in logits[place].tolist()))
        hits.append(int(logits[place].argmax()) == token)
    return total / len(after), hits


def naive(records: list[dict[str, Any]]) -> dict[str, float]:
    """The definitions of the protocol, record by record; the flat form has one prompt of each kind."""
    rows: dict[str, list[float]] = {name: [] for name in ("ES", "PS", "NS", "EM", "PM", "NM")}
    for record in records:
        new, true = record["target_new"], record["ground_truth"]
        for letter, prompt in (("E", record["prompt"]), ("P", record["rephrase_prompt"])):
            good, bad = scored(prompt, new)[0], scored(prompt, true)[0]
            rows[f"{letter}S"].append(float(good < bad))
            rows[f"{letter}M"].append(math.exp(-good) - math.exp(-bad))
        good = scored(record["locality_prompt"], record["locality_ground_truth"])[0]
        bad = scored(record["locality_prompt"], new)[0]
        rows["NS"].append(float(good < bad))
        rows["NM"].append(math.exp(-good) - math.exp(-bad))
    found = {name: 100 * mean(values) for name, values in rows.items()}
    found["S"] = 3 / sum(1 / found[name] for name in ("ES", "PS", "NS"))
    return found


def test_success_magnitude_and_score(records: list[dict[str, Any]], requests: list[EditRequest]) -> None:
    results = evaluate_edits(ModelAdapter(MODEL), TOKENIZER, requests)
    summary = summarise(results, {r.id: r for r in results})
    expected = naive(records)
    published = as_published(summary, "counterfact")
    assert {name: published[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert expected == pytest.approx(GOLDEN, rel=1e-3)
    assert published["GE"] is published["RS"] is None


def test_accuracies(records: list[dict[str, Any]], requests: list[EditRequest]) -> None:
    summary = summarise(evaluate_edits(ModelAdapter(MODEL), TOKENIZER, requests))
    prompts = {"efficacy": ("prompt", "target_new"), "generalization": ("rephrase_prompt", "target_new"),
               "locality": ("locality_prompt", "locality_ground_truth")}  # fmt: skip
    for kind, (prompt, target) in prompts.items():
        hits = [scored(record[prompt], record[target])[1] for record in records]
        assert summary[kind]["accuracy"] == pytest.approx(mean(float(all(row)) for row in hits))
        assert summary[kind]["token_accuracy"] == pytest.approx(mean(mean(map(float, row)) for row in hits))


def test_fluency_and_generated_answers(records: list[dict[str, Any]], requests: list[EditRequest]) -> None:
    results = evaluate_generation(ModelAdapter(MODEL), TOKENIZER, requests, length=24)
    entropies, tokens = [], []
    for record, result in zip(records, results, strict=True):
        (text,) = result.texts
        assert text.startswith(f"{record['subject']} is")
        entropies.append(entropy(text))
        ids, wanted = TOKENIZER(record["prompt"])["input_ids"], TOKENIZER(" " + record["target_new"])["input_ids"]
        right = []
        for target in wanted:  # not teacher-forced: what it says is what it goes on from
            said = int(MODEL(torch.tensor([ids])).logits[0, -1].argmax())
            right.append(float(said == target))
            ids = [*ids, said]
        tokens.append(mean(right))
    summary = summarise_generation(results)
    assert summary["fluency"] == pytest.approx(mean(entropies))
    assert summary["generation"]["efficacy"]["token_accuracy"] == pytest.approx(mean(tokens))


def entropy(text: str) -> float:
    """Written out once more, with split(), on a text whose marks are put apart first."""
    from lit_edit.metrics.texts import words

    tokens = words(text)
    values = []
    for n in (2, 3):
        grams = Counter(zip(*(tokens[shift:] for shift in range(n)), strict=False))
        total = sum(grams.values())
        values.append(-sum(c / total * math.log(c / total, 2) for c in grams.values()) if total else 0.0)
    return mean([2 / 3 * values[0], 4 / 3 * values[1]])


def test_me_ppl(shared_data: Path) -> None:
    texts = [row["Text"] for row in json.loads((shared_data / "me_ppl_50.json").read_text("utf-8"))[:10]]
    nlls = []
    for text in texts:
        ids = TOKENIZER(text, add_special_tokens=False)["input_ids"][:100]
        logp = torch.log_softmax(MODEL(torch.tensor([ids])).logits[0].double(), -1)
        nlls.append([-logp[place, token].item() for place, token in enumerate(ids[1:])])
    cut = [TOKENIZER.decode(TOKENIZER(text)["input_ids"][:100]) for text in texts]
    found = measure_perplexity(ModelAdapter(MODEL), TOKENIZER, cut, leading=False)
    each = [math.exp(mean(row)) for row in nlls]
    assert found == pytest.approx(
        {"mean": mean(each), "median": median(each), "corpus": math.exp(mean(v for row in nlls for v in row))}, rel=1e-4
    )
