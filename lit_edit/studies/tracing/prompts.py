"""Facts as tokens: which tokens are the subject's, what part each plays, and which facts a model knows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from transformers import PreTrainedTokenizerBase

from lit_edit.data.request import DataError
from lit_edit.errors import shorten
from lit_edit.models.adapter import ModelAdapter
from lit_edit.studies.tracing.facts import KnownFact
from lit_edit.text.tokens import continuation, encode, leading_tokens, pad_right, pad_token

ROLES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first subsequent token",
    "further tokens",
    "last token",
)
"""What part a token plays in its prompt, as the field's figures name it."""


@dataclass(frozen=True)
class TokenizedFact:
    """A fact as a model reads it."""

    fact: KnownFact
    ids: tuple[int, ...]  # of the prompt's tokens
    subject: tuple[int, int]  # index of the subject's first token, and index behind its last
    attribute: int  # first token of the attribute as it follows the prompt
    tokens: tuple[str, ...]  # the prompt's, as texts


def tokenize_fact(tokenizer: PreTrainedTokenizerBase, fact: KnownFact) -> TokenizedFact:
    """Tokenise a fact's prompt and find the subject in it.

    Raises:
        DataError: If no token covers the subject, or the tokenizer makes nothing of the attribute.

    Example:
        >>> from lit_edit.testing import tiny_tokenizer
        >>> made = tokenize_fact(tiny_tokenizer(), KnownFact("0", "The capital of Italy is", "Italy", "Rome", 15))
        >>> "".join(made.tokens[slice(*made.subject)])
        ' Italy'
    """
    lead = len(leading_tokens(tokenizer))
    ids = encode(tokenizer, fact.prompt)
    offsets = tokenizer(fact.prompt, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    start, stop = fact.span
    covering = [index for index, (first, end) in enumerate(offsets) if first < stop and end > start]
    if not covering:
        raise DataError(f"no token covers the subject {shorten(fact.subject)!r} in {shorten(fact.prompt)!r}")
    _, attribute = continuation(tokenizer, fact.prompt, fact.attribute)
    tokens = tuple(str(tokenizer.decode([token])) for token in ids)
    return TokenizedFact(fact, ids, (lead + covering[0], lead + covering[-1] + 1), attribute[0], tokens)


def role_of(position: int, subject: tuple[int, int], length: int) -> str | None:
    """Return the one role of a token, or ``None`` before the subject, where nothing is corrupted.

    A token with two roles has the later one: of a subject of one token it is the last; a prompt that ends with the
    subject, or one token behind it, ends with its last token.

    Example:
        >>> [role_of(i, (1, 3), 5) for i in range(5)]  # doctest: +NORMALIZE_WHITESPACE
        [None, 'first subject token', 'last subject token', 'first subsequent token', 'last token']
    """
    first, behind = subject
    if position < first:
        return None
    if position == length - 1:
        return "last token"
    if position == behind - 1:
        return "last subject token"
    if position < behind:
        return "first subject token" if position == first else "middle subject tokens"
    return "first subsequent token" if position == behind else "further tokens"


@torch.no_grad()
def predict_next(adapter: ModelAdapter, rows: Sequence[Sequence[int]], pad: int) -> list[int]:
    """Return the most probable next token of each row of token ids."""
    ids, mask = pad_right(rows, pad, adapter.device)
    with adapter.fast_products():
        states = adapter.last_hidden(ids, mask)
        ends = states[torch.arange(len(rows), device=states.device), mask.sum(1) - 1]
        return [int(token) for token in adapter.logits(ends).argmax(-1)]


def known_facts(
    adapter: ModelAdapter,
    tokenizer: PreTrainedTokenizerBase,
    facts: Iterable[TokenizedFact],
    batch_size: int = 16,
    progress: Callable[[int], object] | None = None,
) -> Iterator[TokenizedFact]:
    """Yield the facts that the model knows: its most probable next token is the attribute's first.

    No more are tried than are asked for, up to a batch; ``progress`` is told how many have been.
    """
    waiting, tried = iter(facts), 0
    while batch := list(islice(waiting, batch_size)):
        predicted = predict_next(adapter, [fact.ids for fact in batch], pad_token(tokenizer))
        tried += len(batch)
        if progress is not None:
            progress(tried)
        yield from (fact for fact, token in zip(batch, predicted, strict=True) if token == fact.attribute)
