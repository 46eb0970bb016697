"""Batched scoring equals one sequence at a time with all logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_edit.metrics.scoring import score_continuations, text_nlls
from lit_edit.models.adapter import ModelAdapter
from lit_edit.testing import tiny_model, tiny_requests, tiny_tokenizer
from lit_edit.text.tokens import continuation

PAIRS = [
    ("The capital of Italy is", "Rome"),
    ("The capital of Italy is", "Vienna"),
    ("The capital of Italy is", "Rome"),  # a duplicate
    ("The capital of Italy is", "Rome and the capital of Spain is Madrid"),  # the first is its beginning
    ("The capital of Italy is Rome and", "the capital of Spain is Madrid"),
    ("Hamlet", "x"),
    ("Mount Fuji is located in", "Ōsaka, 日本"),
    ("The headquarters of Nokia are in", "Brazil"),
    ("The headquarters of Nokia are in ", " Brazil "),  # spaces do not matter
    *((r.text, r.target_new) for r in tiny_requests()),
]
TEXTS = ["The capital of Italy is Rome.", "Hamlet", "a", "The capital of Italy is Rome.", "Mount Fuji is in Japan", ""]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def adapter(request: pytest.FixtureRequest) -> ModelAdapter:
    return ModelAdapter(tiny_model(request.param))


def log_probabilities(adapter: ModelAdapter, ids: list[int]) -> Tensor:
    """Full log-probabilities of one sequence, by the model's own forward."""
    return torch.log_softmax(adapter.model(torch.tensor([ids])).logits[0].double(), -1)


def naive_score(adapter: ModelAdapter, prompt: str, target: str) -> tuple[float, list[bool], list[int]]:
    """One pass over prompt and object as plain text; the tiny tokenizer splits at spaces, so the pieces are exact."""
    tokenizer = tiny_tokenizer()
    before = tokenizer(prompt.strip())["input_ids"]
    after = tokenizer(" " + target.strip())["input_ids"]
    logp = log_probabilities(adapter, before + after)
    rows = logp[len(before) - 1 : -1]
    choice = rows.argmax(1).tolist()
    nll = -rows[range(len(after)), after].mean().item()
    return nll, [c == a for c, a in zip(choice, after, strict=True)], choice


@pytest.mark.parametrize("batch_tokens", [1, 40, 2048])
def test_scores_equal_the_naive_computation(adapter: ModelAdapter, batch_tokens: int) -> None:
    scores = score_continuations(adapter, tiny_tokenizer(), PAIRS, batch_tokens)
    assert len(scores) == len(PAIRS)
    for (prompt, target), score in zip(PAIRS, scores, strict=True):
        nll, hits, choice = naive_score(adapter, prompt, target)
        assert score.nll == pytest.approx(nll, abs=1e-5)
        assert (score.hits.tolist(), score.choice.tolist()) == (hits, choice)
    assert max(len(score.hits) for score in scores) > 3


def test_hits_are_found_where_the_object_is_what_the_model_says(adapter: ModelAdapter) -> None:
    """The greedy continuation, decoded and scored again, is hit at every token."""
    tokenizer, found = tiny_tokenizer(), 0
    prompts = [f"{request.text} {number}" for request in tiny_requests() for number in range(12)]
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        token = log_probabilities(adapter, ids)[-1].argmax().item()
        word = tokenizer.decode([token])
        if not word.startswith(" ") or not word.isascii() or not word.strip().isalpha():
            continue  # not an object as it is written
        (score,) = score_continuations(adapter, tokenizer, [(prompt, word)])
        if len(score.hits) == 1:
            found += 1
            assert score.hits.tolist() == [True]
            assert score.choice.tolist() == [token]
    assert found


def test_what_rows_have_in_common_is_run_once(adapter: ModelAdapter) -> None:
    run: list[int] = []
    handle = adapter.down_proj(0).register_forward_pre_hook(lambda module, args: run.append(args[0].shape[:-1].numel()))
    try:
        score_continuations(adapter, tiny_tokenizer(), PAIRS[:5] + PAIRS[:2])
    finally:
        handle.remove()
    tokens = [continuation(tiny_tokenizer(), *pair) for pair in PAIRS[:5]]
    rows = [prompt + target[:-1] for prompt, target in tokens]
    assert sum(run) == len({row[: i + 1] for row in rows for i in range(len(row))})


def test_scores_are_those_of_the_view_it_is_given(adapter: ModelAdapter) -> None:
    weight = adapter.down_proj(1).weight
    view = adapter.with_weights({adapter.weight_name(1): weight * -3})
    base, moved = (score_continuations(a, tiny_tokenizer(), PAIRS)[0].nll for a in (adapter, view))
    assert abs(base - moved) > 1e-3
    with torch.no_grad():
        weight.mul_(-3)
    try:
        assert score_continuations(adapter, tiny_tokenizer(), PAIRS)[0].nll == pytest.approx(moved, abs=1e-5)
    finally:
        with torch.no_grad():
            weight.div_(-3)


def test_nothing_to_score(adapter: ModelAdapter) -> None:
    assert score_continuations(adapter, tiny_tokenizer(), []) == []
    assert text_nlls(adapter, tiny_tokenizer(), []) == []


@pytest.mark.parametrize("batch_tokens", [1, 16, 2048])
def test_text_nlls_equal_the_naive_computation(adapter: ModelAdapter, batch_tokens: int) -> None:
    found = text_nlls(adapter, tiny_tokenizer(), TEXTS, batch_tokens)
    for text, nll in zip(TEXTS, found, strict=True):
        ids = tiny_tokenizer()(text)["input_ids"]
        if len(ids) < 2:
            assert nll.numel() == 0
            continue
        logp = log_probabilities(adapter, ids)
        expected = -logp[range(len(ids) - 1), ids[1:]]
        torch.testing.assert_close(nll.double(), expected, atol=1e-5, rtol=0)


def test_bfloat16_models_are_scored_in_single_precision() -> None:
    adapter = ModelAdapter(tiny_model(dtype=torch.bfloat16))
    scores = score_continuations(adapter, tiny_tokenizer(), PAIRS)
    fractions = {score.nll - torch.tensor(score.nll).bfloat16().item() for score in scores}
    assert len(fractions - {0.0}) > 3


def test_gradients_are_not_kept() -> None:
    model = tiny_model().requires_grad_(True)
    nll = text_nlls(ModelAdapter(model), tiny_tokenizer(), TEXTS)[0]
    assert not nll.requires_grad
