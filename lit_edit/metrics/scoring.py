"""Scoring continuations: one batched pass over many (prompt, object) pairs, the head only where it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.packed import TokenRows
from lit_edit.text.tokens import continuation, encode, leading_tokens, pad_token


@dataclass(frozen=True)
class Score:
    """How a model continues a prompt, against one object."""

    nll: float  # length-normalised negative log-likelihood of the object
    hits: Tensor  # (tokens,) bool: whether each object token is the model's first choice (teacher forcing)
    choice: Tensor  # (tokens,): the first choices themselves


@torch.no_grad()
def score_continuations(
    adapter: ModelAdapter,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    batch_tokens: int = 2048,
) -> list[Score]:
    """Score ``(prompt, object)`` pairs: objects as continuations of prompts.

    What prompts have in common is computed once (:mod:`lit_edit.models.packed`), so two objects of one prompt cost
    little more than one.
    """
    if not pairs:
        return []
    unique = list(dict.fromkeys(pairs))
    scores = {}
    for model, context_of in adapter.by_route([prompt for prompt, _ in unique]):
        own = [pair for pair in unique if pair[0] in context_of]
        tokens = [continuation(tokenizer, context_of[prompt] + prompt, target) for prompt, target in own]
        rows = [prompt + target[:-1] for prompt, target in tokens]
        found = _score(model, tokenizer, rows, [target for _, target in tokens], batch_tokens)
        for pair, (_, target), (nll, choice) in zip(own, tokens, found, strict=True):
            scores[pair] = Score(nll.mean().item(), choice == torch.tensor(target), choice)
    return [scores[pair] for pair in pairs]


@torch.no_grad()
def text_nlls(
    adapter: ModelAdapter,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_tokens: int = 2048,
    leading: bool = True,
) -> list[Tensor]:
    """Return per text, cut at 512 tokens, the nll of each token but the first (no BOS beyond the tokenizer's own).

    Without the tokenizer's ``leading`` special tokens, mostly BOS, the first token of the text itself is not scored.
    """
    nlls: dict[str, Tensor] = {}
    skipped = 0 if leading else len(leading_tokens(tokenizer))
    for model, context_of in adapter.by_route(list(dict.fromkeys(texts))):
        rows = {text: encode(tokenizer, text)[skipped : skipped + 512] for text in context_of}
        nlls |= {text: torch.empty(0) for text in rows}
        long = [text for text, row in rows.items() if len(row) > 1]
        full, asked = [], []
        for text in long:
            context = context_of[text]
            lead = len(leading_tokens(tokenizer)) - skipped if context else 0  # stands before the context instead
            full.append((encode(tokenizer, context) if context else ()) + rows[text][lead:])
            asked.append(rows[text][max(lead, 1) :])
        found = _score(model, tokenizer, [row[:-1] for row in full], asked, batch_tokens)
        nlls |= {text: nll for text, (nll, _) in zip(long, found, strict=True)}
    return [nlls[text] for text in texts]


def _score(
    adapter: ModelAdapter,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    batch_tokens: int,
) -> list[tuple[Tensor, Tensor]]:
    """Return, per row of token ids, what :func:`_read` finds at its last tokens, one per label; ranks share batches."""
    ranks = adapter.ranks
    share = -(-sum(map(len, rows)) // ranks.size)
    batches = _batches(rows, min(batch_tokens, max(share, 1)) if ranks.together else batch_tokens)
    starts = list(accumulate(map(len, labels), initial=0))
    # What another rank finds is zero here: each place is filled by one rank, and the sum is what it has found.
    dtype = torch.float64 if adapter.dtype == torch.float64 else torch.float32  # of logits
    nlls, choices = torch.zeros(starts[-1], dtype=dtype), torch.zeros(starts[-1], dtype=torch.long)
    for batch, counts in ranks.deal(batches):
        line = TokenRows(adapter, [rows[index] for index in batch], pad_token(tokenizer)).line()
        with adapter.fast_products():
            hidden = line.run(line.hidden, 0, adapter.n_layers)
        read = [
            line.index(number, len(rows[index]) - len(labels[index]) + j)
            for number, index in enumerate(batch)
            for j in range(len(labels[index]))
        ]
        found = _read(adapter, hidden, read, [token for index in batch for token in labels[index]])
        if counts:
            places = torch.cat([torch.arange(starts[index], starts[index + 1]) for index in batch])
            nlls[places], choices[places] = found
    ranks.sum_(nlls, choices)
    return [(nlls[a:b].clone(), choices[a:b].clone()) for a, b in pairwise(starts)]


def _read(
    adapter: ModelAdapter, hidden: Tensor, read: Sequence[int], labels: Sequence[int], rows: int = 128
) -> tuple[Tensor, Tensor]:
    """Apply final norm and head to the states of a line, ``(tokens, d_model)``, that stand at some places.

    The head sees ``rows`` states at a time: its output is the largest tensor of all. Returned are the negative
    log-likelihoods of their labels and the first choices, each ``(states,)``, on the CPU.
    """
    nlls, choices = [], []
    for at, label in zip(torch.tensor(read).split(rows), torch.tensor(labels).split(rows), strict=True):
        with adapter.fast_products():
            logits = adapter.logits(adapter.finish(hidden[at.to(hidden.device)]))
        logp = torch.log_softmax(logits, -1)
        nlls.append(-logp.gather(1, label[:, None].to(logp.device))[:, 0].cpu())
        choices.append(logp.argmax(1).cpu())
    return torch.cat(nlls), torch.cat(choices)


def _batches(rows: Sequence[Sequence[int]], batch_tokens: int) -> list[list[int]]:
    """Cut rows (by index) into batches of at most ``batch_tokens`` tokens, or one row; alike rows into the same one."""
    batches: list[list[int]] = []
    size = 0
    for index in sorted(range(len(rows)), key=lambda i: (tuple(rows[i]), i)):
        size += len(rows[index])
        if not batches or size > batch_tokens:
            batches.append([])
            size = len(rows[index])
        batches[-1].append(index)
    return batches
