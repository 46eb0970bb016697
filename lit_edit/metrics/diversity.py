"""How hard and how varied the targets of edits are: perplexity on a model, distinct n-grams, entropy, length.

D4S's paper (arXiv 2410.23843) finds that edits wear a model out the more, the higher the perplexity of their targets,
and the longer and more diverse these are.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lit_edit.data.request import EditRequest
from lit_edit.metrics.scoring import score_continuations
from lit_edit.metrics.texts import bits, n_grams
from lit_edit.models.adapter import ModelAdapter


@dataclass(frozen=True)
class TargetSummary:
    """What the targets of some edits are like."""

    edits: int
    perplexity: float  # exp of the mean over targets of their length-normalised nll, on the model
    first_choice: float  # share of targets that the model says anyway: every token is its first choice
    nats: float  # mean nll of whole targets, the sum over their tokens
    tokens: float  # mean length in the model's tokens
    kinds: int  # how many different targets there are
    entropy: float  # of the distribution of whole targets, in bits
    distinct_1: float | None  # different words among all words of the targets
    distinct_2: float | None  # different pairs of neighbouring words among all; None where no target has two words


def distinct(texts: Iterable[str], n: int) -> float | None:
    """Share of different n-grams of words among all n-grams of some texts (distinct-n, arXiv 1510.03055).

    Upper and lower case are one, n-grams do not reach over the ends of texts; ``None`` if no text has ``n`` words.

    Raises:
        ValueError: If ``n`` is less than 1.

    Example:
        >>> distinct(["to buy bread", "to buy milk"], 1), distinct(["to buy bread", "to buy milk"], 2)
        (0.6666666666666666, 0.75)
    """
    grams = [gram for text in texts for gram in n_grams(text.casefold().split(), n)]
    return len(set(grams)) / len(grams) if grams else None


def entropy(texts: Iterable[str]) -> float:
    """Entropy of the distribution of whole texts, in bits: 0 if all are the same, log2 of their number if none are.

    Raises:
        ValueError: If there are none.

    Example:
        >>> entropy(["True", "False", "True", "False"])
        1.0
    """
    texts = list(texts)
    if not texts:
        raise ValueError("expected at least one text, got none")
    return bits(texts)


def describe_targets(
    adapter: ModelAdapter, tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest]
) -> TargetSummary:
    """Measure the targets of edits, each after its own prompt, on a model before any edit.

    Raises:
        ValueError: If there are none.
    """
    if not requests:
        raise ValueError("expected at least one request, got none")
    targets = [request.target_new for request in requests]
    pairs = [(request.text, request.target_new) for request in requests]
    scores = score_continuations(adapter, tokenizer, pairs)
    return TargetSummary(
        edits=len(requests),
        perplexity=math.exp(statistics.fmean(score.nll for score in scores)),
        first_choice=statistics.fmean(bool(score.hits.all()) for score in scores),
        nats=statistics.fmean(score.nll * len(score.hits) for score in scores),
        tokens=statistics.fmean(len(score.hits) for score in scores),
        kinds=len(set(targets)),
        entropy=entropy(targets),
        distinct_1=distinct(targets, 1),
        distinct_2=distinct(targets, 2),
    )
