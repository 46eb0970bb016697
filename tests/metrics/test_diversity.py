"""Diversity of targets, by hand; their perplexity, against a plain forward pass."""

from __future__ import annotations

import math

import pytest
import torch

from lit_edit.metrics.diversity import describe_targets, distinct, entropy
from lit_edit.models import ModelAdapter
from lit_edit.testing import tiny_model, tiny_requests, tiny_tokenizer
from lit_edit.text.tokens import continuation


def test_distinct_counts_different_ngrams() -> None:
    texts = ["to buy bread", "To buy milk", "sleep"]
    # words: to buy bread to buy milk sleep, five of seven are different; pairs: to buy, buy bread, to buy, buy milk
    assert distinct(texts, 1) == 5 / 7
    assert distinct(texts, 2) == 3 / 4
    assert distinct(texts, 3) == 1.0
    assert distinct(["A", "B", "A", "A"], 1) == 0.5
    assert distinct(["A", "B"], 2) is None
    assert distinct([], 1) is None
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        distinct(texts, 0)


def test_entropy_of_whole_texts() -> None:
    assert entropy(["x"] * 5) == 0.0
    assert entropy("abcd" * 3) == 2.0
    assert entropy(["a", "a", "b", "c"]) == 1.5  # 1/2 log 2 + 2 * 1/4 log 4
    with pytest.raises(ValueError, match="at least one text"):
        entropy([])


def test_targets_are_described() -> None:
    model, tokenizer, requests = tiny_model(), tiny_tokenizer(), tiny_requests()[:3]
    found = describe_targets(ModelAdapter(model), tokenizer, requests)
    nlls, lengths = [], []
    for request in requests:
        prompt, target = continuation(tokenizer, request.text, request.target_new)
        logp = model(torch.tensor([prompt + target])).logits[0].log_softmax(-1)
        nlls.append([-logp[len(prompt) - 1 + j, token].item() for j, token in enumerate(target)])
        lengths.append(len(target))
    means = [sum(nll) / len(nll) for nll in nlls]
    assert found.edits == 3
    assert found.perplexity == pytest.approx(math.exp(sum(means) / 3), rel=1e-4)
    assert found.nats == pytest.approx(sum(map(sum, nlls)) / 3, rel=1e-4)
    assert found.tokens == sum(lengths) / 3
    assert (found.kinds, found.distinct_1, found.distinct_2) == (3, 1.0, None)  # Vienna, Greek, chess
    assert found.entropy == pytest.approx(math.log2(3))
    assert found.first_choice == 0.0
    with pytest.raises(ValueError, match="at least one request"):
        describe_targets(ModelAdapter(model), tokenizer, [])
