"""Measuring edits: the summary against a computation from scratch, on a tiny model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from statistics import mean

import pytest
import torch

from lit_edit.data.request import EditRequest, Probe
from lit_edit.metrics.evaluation import (
    KINDS,
    EditMetrics,
    EditResult,
    ProbeResult,
    evaluate_edits,
    flatten,
    measure_perplexity,
    summarise,
)
from lit_edit.models.adapter import ModelAdapter
from lit_edit.testing import tiny_model, tiny_requests, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
CORNERS = [
    replace(tiny_requests()[0], id="no probes", paraphrases=(), neighborhood=(), generation=()),
    replace(tiny_requests()[1], id="truth unknown", target_true=None),
]
REQUESTS = [*tiny_requests(), *CORNERS]


@pytest.fixture(scope="module")
def adapter() -> ModelAdapter:
    return ModelAdapter(tiny_model())


@pytest.fixture(scope="module")
def edited() -> ModelAdapter:
    adapter = ModelAdapter(tiny_model())
    return adapter.with_weights({adapter.weight_name(2): 2.5 * adapter.weight(2)})


@pytest.fixture(scope="module")
def results(adapter: ModelAdapter) -> list[EditResult]:
    return evaluate_edits(adapter, tiny_tokenizer(), REQUESTS)


def naive(adapter: ModelAdapter, prompt: str, target: str) -> tuple[float, list[bool], list[int]]:
    before, after = (tiny_tokenizer()(text)["input_ids"] for text in (prompt, f" {target}"))
    hidden = adapter.last_hidden(torch.tensor([before + after]), torch.ones(1, len(before + after), dtype=torch.long))
    logp = torch.log_softmax(adapter.logits(hidden)[0, len(before) - 1 : -1], -1)
    choice = logp.argmax(1).tolist()
    return -logp[range(len(after)), after].mean().item(), [c == a for c, a in zip(choice, after, strict=True)], choice


def rows_of(request: EditRequest, kind: str) -> list[tuple[str, str, str | None]]:
    """Prompt, the object that should win, and the other."""
    new, true = request.target_new, request.target_true
    return {
        "efficacy": [(request.text, new, true)],
        "generalization": [(prompt, new, true) for prompt in request.paraphrases],
        "locality": [(probe.prompt, probe.answer, new) for probe in request.neighborhood],
    }[kind]


def test_every_probe_is_measured_as_the_protocol_says(adapter: ModelAdapter, results: list[EditResult]) -> None:
    assert [r.id for r in results] == [r.id for r in REQUESTS]
    for request, result in zip(REQUESTS, results, strict=True):
        for kind in KINDS:
            rows, probes = rows_of(request, kind), getattr(result, kind)
            assert len(rows) == len(probes)
            for (prompt, wanted, other), probe in zip(rows, probes, strict=True):
                nll, hits, choice = naive(adapter, prompt, wanted)
                assert probe.preferred == pytest.approx(nll, abs=1e-5)
                assert (list(probe.hits), list(probe.choice)) == (hits, choice)
                expected = None if other is None else pytest.approx(naive(adapter, prompt, other)[0], abs=1e-5)
                assert probe.other == expected


def expected_family(adapter: ModelAdapter, kind: str) -> dict[str, float]:
    values: dict[str, list[float]] = {"success": [], "magnitude": [], "accuracy": [], "token_accuracy": []}
    for request in REQUESTS:
        rows = rows_of(request, kind)
        wanted = [naive(adapter, prompt, obj) for prompt, obj, _ in rows]
        if wanted:
            values["accuracy"].append(mean(float(all(hits)) for _, hits, _ in wanted))
            values["token_accuracy"].append(mean(mean(map(float, hits)) for _, hits, _ in wanted))
        if wanted and all(other is not None for _, _, other in rows):
            others = [naive(adapter, prompt, other)[0] for prompt, _, other in rows if other is not None]
            values["success"].append(mean(float(w[0] < o) for w, o in zip(wanted, others, strict=True)))
            values["magnitude"].append(
                mean(math.exp(-w[0]) - math.exp(-o) for w, o in zip(wanted, others, strict=True))
            )
    return {name: mean(numbers) for name, numbers in values.items()}


@pytest.mark.parametrize("view", ["adapter", "edited"])
def test_the_summary_equals_a_computation_from_scratch(view: str, request: pytest.FixtureRequest) -> None:
    model: ModelAdapter = request.getfixturevalue(view)
    base: ModelAdapter = request.getfixturevalue("adapter")
    before = {r.id: r for r in evaluate_edits(base, tiny_tokenizer(), REQUESTS)}
    summary = summarise(evaluate_edits(model, tiny_tokenizer(), REQUESTS), before, perplexity=12.5)
    rates = []
    for kind in KINDS:
        expected = expected_family(model, kind)
        assert {name: summary[kind][name] for name in expected} == pytest.approx(expected, abs=1e-5)
        rates.append(expected["success"])
    assert summary["score"] == pytest.approx(len(rates) / sum(1 / r for r in rates) if all(rates) else 0.0)
    same = [
        mean(
            mean(float(a == b) for a, b in zip(naive(base, p, o)[2], naive(model, p, o)[2], strict=True))
            for p, o, _ in rows_of(r, "locality")
        )
        for r in REQUESTS
        if r.neighborhood
    ]
    assert summary["locality"]["agreement"] == pytest.approx(mean(same))
    assert summary["perplexity"] == 12.5
    assert view == "adapter" or mean(same) < 1.0


def probe(preferred: float, other: float | None, *hits: bool) -> ProbeResult:
    return ProbeResult(preferred, other, hits, tuple(range(len(hits))))


def test_golden_values_by_hand() -> None:
    """Two edits, all numbers worked out on paper."""
    log = math.log
    results = [
        EditResult(
            "a",
            (probe(log(2), log(4), True, True),),  # success 1, magnitude 1/4, accuracy 1
            (probe(log(2), log(4), True), probe(log(4), log(2), False)),  # 1/2, 0, 1/2
            (probe(log(4), log(4), True, False),),  # 0, 0, 0, tokens 1/2
        ),
        EditResult(
            "b",
            (probe(log(5), log(2), True, False, False, False),),  # 0, 1/5 - 1/2, 0, tokens 1/4
            (),
            (probe(log(2), log(10), True), probe(log(2), log(10), True)),  # 1, 2/5, 1
        ),
    ]
    summary = summarise(results)
    assert summary["efficacy"] == pytest.approx(
        {"success": 0.5, "magnitude": -0.025, "accuracy": 0.5, "token_accuracy": 0.625}
    )
    assert summary["generalization"] == pytest.approx(
        {"success": 0.5, "magnitude": 0.0, "accuracy": 0.5, "token_accuracy": 0.5}
    )
    locality = {"success": 0.5, "magnitude": 0.2, "accuracy": 0.5, "token_accuracy": 0.75, "agreement": None}
    assert summary["locality"] == pytest.approx(locality)
    assert summary["score"] == pytest.approx(0.5)
    assert summary["perplexity"] is None


def test_values_are_none_where_no_edit_has_the_probes(adapter: ModelAdapter) -> None:
    (result,) = evaluate_edits(adapter, tiny_tokenizer(), [CORNERS[0]])
    summary = summarise([result], {result.id: result})
    assert summary["efficacy"]["success"] in (0.0, 1.0)
    assert set(summary["generalization"].values()) == set(summary["locality"].values()) == {None}
    assert summary["score"] is None
    (result,) = evaluate_edits(adapter, tiny_tokenizer(), [CORNERS[1]])
    summary = summarise([result])
    assert summary["efficacy"]["success"] is summary["efficacy"]["magnitude"] is None
    assert summary["efficacy"]["accuracy"] is not None
    assert summary["locality"]["success"] is not None  # the neighbour's answer is known
    assert summary["locality"]["agreement"] is None  # but nothing to compare with


def test_an_empty_summary_has_no_values() -> None:
    summary = EditMetrics().compute()
    assert flatten(summary, "x") == {}
    assert set(summary) == {*KINDS, "score"}


def test_agreement_is_measured_against_the_before_result() -> None:
    before = EditResult("a", (probe(1, 2, True),), (), (ProbeResult(1.0, 2.0, (True, True), (5, 6)),))
    after = EditResult("a", (probe(1, 2, True),), (), (ProbeResult(1.0, 2.0, (True, False), (5, 7)),))
    assert summarise([after], {"a": before})["locality"]["agreement"] == 0.5
    assert summarise([after], {"a": after})["locality"]["agreement"] == 1.0
    assert summarise([after], {"b": before})["locality"]["agreement"] is None


def test_results_survive_json(results: list[EditResult]) -> None:
    for result in results:
        state = json.loads(json.dumps(result.as_state(), allow_nan=False))
        assert EditResult.from_state(state) == result


def test_flatten_drops_what_is_missing() -> None:
    summary = {"efficacy": {"success": 1, "magnitude": None}, "score": None, "perplexity": 3.5}
    assert flatten(summary, "final") == {"final/efficacy/success": 1.0, "final/perplexity": 3.5}


def test_evaluation_leaves_the_model_alone(adapter: ModelAdapter) -> None:
    before = {name: value.clone() for name, value in adapter.model.state_dict().items()}
    evaluate_edits(adapter, tiny_tokenizer(), REQUESTS)
    assert all(torch.equal(value, before[name]) for name, value in adapter.model.state_dict().items())


def test_no_requests_no_results(adapter: ModelAdapter) -> None:
    assert evaluate_edits(adapter, tiny_tokenizer(), []) == []


def test_prompts_of_another_length_do_not_change_a_result(adapter: ModelAdapter, results: list[EditResult]) -> None:
    long = EditRequest("long", "{} " + "and so on " * 8 + "is", "Italy", "new", neighborhood=(Probe("x " * 40, "y"),))
    (alone,) = evaluate_edits(adapter, tiny_tokenizer(), [REQUESTS[2]])
    together = evaluate_edits(adapter, tiny_tokenizer(), [long, REQUESTS[2]])[1]
    assert together.efficacy[0].preferred == pytest.approx(alone.efficacy[0].preferred, abs=1e-5)
    assert together.locality[0].choice == alone.locality[0].choice == results[2].locality[0].choice


def test_perplexity_of_texts(adapter: ModelAdapter) -> None:
    texts = ["The capital of Italy is Rome.", "Mount Fuji is in Japan", "a"]
    nlls = []
    for text in texts[:2]:
        ids = tiny_tokenizer()(text)["input_ids"]
        logp = torch.log_softmax(adapter.model(torch.tensor([ids])).logits[0].double(), -1)
        nlls.append([-logp[i, token].item() for i, token in enumerate(ids[1:])])
    found = measure_perplexity(adapter, tiny_tokenizer(), texts)
    means = [math.exp(mean(nll)) for nll in nlls]
    assert found["mean"] == pytest.approx(mean(means), rel=1e-5)
    assert found["median"] == pytest.approx(mean(means), rel=1e-5)
    assert found["corpus"] == pytest.approx(math.exp(mean(nll for row in nlls for nll in row)), rel=1e-5)
