"""Scores dealt out to ranks: those of one process, on every rank, and each edit counted once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torchmetrics import Metric

from lit_edit.data.request import EditRequest
from lit_edit.devices.ranks import Ranks
from lit_edit.metrics.evaluation import EditMetrics, evaluate_edits, flatten, measure_perplexity, summarise
from lit_edit.metrics.scoring import score_continuations, text_nlls
from lit_edit.models.adapter import ModelAdapter
from lit_edit.testing import tiny_model, tiny_requests, tiny_tokenizer
from tests.metrics.test_scoring import PAIRS, TEXTS
from tests.ranks.together import Found, together

SIZES = [2, 3]
CLOSE = 1e-5
HOWS: list[dict[str, bool]] = [{}, {"lockstep": True}, {"lockstep": True, "alike": True}]
PAIR_SETS = {"all": PAIRS, "one": PAIRS[:1], "two": PAIRS[:2], "one twice": [PAIRS[0], PAIRS[2]], "none": []}
TEXT_SETS = {"all": TEXTS, "one": TEXTS[:1], "too short": ["a", ""], "one long": ["a", TEXTS[0]], "none": []}
FAMILIES = ["llama", "gptj"]


def requests() -> list[EditRequest]:
    """Edits with and without probes of each kind."""
    made = tiny_requests()
    made[1] = replace(made[1], paraphrases=(), neighborhood=())
    made[2] = replace(made[2], target_true=None)
    return made


def count_of(metric: Any) -> Any:
    """What a metric has counted, asked for as ``compute`` does, where torchmetrics would add the ranks up."""
    metric.compute()
    return metric.count.tolist() if hasattr(metric, "count") else metric.counts.tolist()


def score(ranks: Ranks) -> Found:
    found: Found = {}
    for family in FAMILIES:
        for how in HOWS if ranks.together else HOWS[:1]:
            adapter = ModelAdapter(tiny_model(family), products="torch")
            adapter.ranks = replace(ranks, **how)
            ran: list[int] = []
            adapter.down_proj(0).register_forward_pre_hook(
                lambda module, args, ran=ran: ran.append(args[0].shape[:-1].numel())
            )
            for name, pairs in PAIR_SETS.items():
                for batch_tokens in (16, 2048):
                    case = f"{family} {how} pairs {name} {batch_tokens}"
                    ran.clear()
                    scores = score_continuations(adapter, tiny_tokenizer(), pairs, batch_tokens)
                    found[case] = [s.nll for s in scores]
                    found[f"{case} tokens"] = [[s.hits.tolist(), s.choice.tolist()] for s in scores]
                    found[f"{case} ran"] = list(ran)
            for name, texts in TEXT_SETS.items():
                nlls = text_nlls(adapter, tiny_tokenizer(), texts)
                found[f"{family} {how} texts {name}"] = [nll.tolist() for nll in nlls]
            found[f"{family} {how} perplexity"] = measure_perplexity(adapter, tiny_tokenizer(), TEXTS)
            results = evaluate_edits(adapter, tiny_tokenizer(), requests())
            found[f"{family} {how} results"] = [result.as_state() for result in results]
            metrics = EditMetrics()
            for result in results:
                metrics.update(result, result)
            found[f"{family} {how} summary"] = metrics.compute()
            counted = {n: m for n, m in metrics.named_modules() if isinstance(m, Metric)}
            found[f"{family} {how} counts"] = {name: count_of(metric) for name, metric in counted.items()}
            # Should a rank have other results than the others, its summary is that of its own.
            own = range(1, 4) if not ranks.together else [ranks.rank + 1]
            found[f"{family} {how} own"] = [flatten(summarise(results[:count]), "") for count in own]
            assert summarise(results, {r.id: r for r in results}) == {**metrics.compute(), "perplexity": None}
    return found


@pytest.fixture(scope="module")
def alone() -> Found:
    return together(1, score)[0]


@pytest.fixture(scope="module", params=SIZES)
def everyone(request: pytest.FixtureRequest) -> list[Found]:
    return together(request.param, score)


def flat(value: Any) -> list[Any]:
    """All numbers and texts in plain data, in order."""
    if isinstance(value, dict):
        value = [part for pair in sorted(value.items()) for part in pair]
    return [part for item in value for part in flat(item)] if isinstance(value, list) else [value]


def test_scores_and_perplexity_are_those_of_one_process(everyone: list[Found], alone: Found) -> None:
    cases = [name for name in everyone[0] if not name.endswith((" ran", " own"))]
    assert len(cases) > 150
    for rank, found in enumerate(everyone):
        for case in cases:
            family, _, rest = case.partition(" ")
            expected = alone[f"{family} {{}} {rest.partition('} ')[2]}"]
            mine, theirs = flat(found[case]), flat(expected)
            assert len(mine) == len(theirs), case
            for value, other in zip(mine, theirs, strict=True):
                close = pytest.approx(other, abs=CLOSE, rel=CLOSE) if isinstance(other, float) else other
                assert value == close, (rank, case)
            assert found[case] == everyone[0][case], case  # bit for bit


def test_the_work_is_shared(everyone: list[Found], alone: Found) -> None:
    """Each rank runs a part; in lockstep all run equally often; and with few tokens nobody runs more than alone."""
    size = len(everyone)
    for family in FAMILIES:
        ran = [found[f"{family} {{}} pairs all 2048 ran"] for found in everyone]
        whole = sum(alone[f"{family} {{}} pairs all 2048 ran"])
        assert all(0 < sum(tokens) < 0.8 * whole for tokens in ran)
        assert [len(found[f"{family} {{}} pairs one 16 ran"]) for found in everyone] == [1] + [0] * (size - 1)
        for how in HOWS[1:]:
            for name in PAIR_SETS:
                times = {len(found[f"{family} {how} pairs {name} 16 ran"]) for found in everyone}
                assert len(times) == 1, (how, name)
        alike = [found[f"{family} {HOWS[2]} pairs all 16 ran"] for found in everyone]
        assert all(tokens == alike[0] for tokens in alike)


def test_no_edit_is_counted_twice(everyone: list[Found], alone: Found) -> None:
    for family in FAMILIES:
        counts = alone[f"{family} {{}} counts"]
        assert counts["kinds.efficacy.accuracy"] == len(requests())
        assert counts["kinds.efficacy.success"] == counts["kinds.locality.accuracy"] == len(requests()) - 1
        assert counts["agreement"] > 0
        assert counts["harmonic"] == [5, 4, 5]  # of efficacy, generalization, locality
        for rank, found in enumerate(everyone):
            for how in HOWS:
                assert found[f"{family} {how} counts"] == counts
                assert found[f"{family} {how} own"] == [pytest.approx(alone[f"{family} {{}} own"][rank], abs=CLOSE)]
            agreement = found[f"{family} {{}} summary"]["locality"]["agreement"]
            assert agreement == 1.0  # of each result with itself


def test_scores_differ_from_each_other(alone: Found) -> None:
    """What the comparisons above rest on."""
    nlls = alone["llama {} pairs all 2048"]
    assert len({round(nll, 3) for nll in nlls}) > len(set(PAIRS)) // 2
    assert torch.tensor(nlls).std() > 0.1
