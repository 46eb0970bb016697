"""Scoring continuations: one batched pass over many (prompt, object) pairs, the head only where it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_edit.models.adapter import ModelAdapter
from lit_edit.tokens import continuation, encode, pad_right, pad_token


@dataclass(frozen=True)
class Score:
    """How a model continues a prompt, against one object.

    Attributes:
        nll: Length-normalised negative log-likelihood of the object.
        hits: ``(tokens,)`` bool, whether each object token is the model's first choice (teacher forcing).
        choice: ``(tokens,)`` the first choices themselves.
    """

    nll: float
    hits: Tensor
    choice: Tensor


@torch.no_grad()
def score_continuations(
    adapter: ModelAdapter,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    batch_tokens: int = 2048,
) -> list[Score]:
    """Score objects as continuations of prompts.

    Rows that are the beginning of another row are not run: in a causal model the longer row answers for both. Rows are
    batched by length.

    Args:
        adapter: The model.
        tokenizer: Its tokenizer.
        pairs: ``(prompt, object)``.
        batch_tokens: Tokens per batch, padding included.

    Returns:
        The scores, in order.
    """
    if not pairs:
        return []
    tokens = [continuation(tokenizer, prompt, target) for prompt, target in dict.fromkeys(pairs)]
    unique = list(dict.fromkeys(pairs))
    rows = [prompt + target[:-1] for prompt, target in tokens]
    host = _hosts(rows)
    wanted: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(rows):
        wanted.setdefault(host[row], []).append(index)
    scores: dict[tuple[str, str], Score] = {}
    for batch in _batches(sorted(wanted, key=lambda r: (len(r), r)), batch_tokens):
        ids, mask = pad_right(batch, pad_token(tokenizer), adapter.device)
        hidden = adapter.last_hidden(ids, mask)
        where: list[tuple[int, int]] = []  # row of the batch, position
        labels: list[int] = []
        owners: list[tuple[int, int]] = []  # pair, tokens
        for number, row in enumerate(batch):
            for index in wanted[row]:
                prompt, target = tokens[index]
                where += [(number, len(prompt) - 1 + j) for j in range(len(target))]
                labels += target
                owners.append((index, len(target)))
        at = torch.tensor(where, device=hidden.device)
        logp = torch.log_softmax(adapter.logits(hidden[at[:, 0], at[:, 1]]), -1)
        label = torch.tensor(labels, device=logp.device)
        token_nll = (-logp.gather(1, label[:, None])[:, 0]).cpu()
        choice = logp.argmax(1).cpu()
        start = 0
        for index, count in owners:
            part = slice(start, start + count)
            scores[unique[index]] = Score(
                token_nll[part].mean().item(), choice[part] == label[part].cpu(), choice[part].clone()
            )
            start += count
    return [scores[pair] for pair in pairs]


@torch.no_grad()
def text_nlls(
    adapter: ModelAdapter, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_tokens: int = 2048
) -> list[Tensor]:
    """Return per text the nll of each token but the first (no BOS added beyond the tokenizer's own).

    Args:
        adapter: The model.
        tokenizer: Its tokenizer.
        texts: Any texts; cut at 512 tokens.
        batch_tokens: Tokens per batch, padding included.
    """
    rows = {text: encode(tokenizer, text)[:512] for text in texts}
    nlls: dict[tuple[int, ...], Tensor] = {row: torch.empty(0) for row in rows.values()}
    long = sorted({row for row in rows.values() if len(row) > 1}, key=lambda r: (len(r), r))
    for batch in _batches(long, batch_tokens):
        ids, mask = pad_right(batch, pad_token(tokenizer), adapter.device)
        hidden = adapter.last_hidden(ids, mask)
        for number, row in enumerate(batch):
            logp = torch.log_softmax(adapter.logits(hidden[number, : len(row) - 1]), -1)
            nlls[row] = -logp.gather(1, ids[number, 1 : len(row), None])[:, 0].cpu()
    return [nlls[rows[text]] for text in texts]


def _hosts(rows: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Map each row to the longest row that begins with it."""
    host: dict[tuple[int, ...], tuple[int, ...]] = {}
    previous: tuple[int, ...] = ()
    for row in sorted(set(rows), reverse=True):  # a row comes right after the rows it is a beginning of
        previous = previous if previous[: len(row)] == row else row
        host[row] = previous
    return host


def _batches(rows: Sequence[tuple[int, ...]], batch_tokens: int) -> list[list[tuple[int, ...]]]:
    """Cut rows sorted by length into batches of at most ``batch_tokens`` padded tokens (and at least one row)."""
    batches: list[list[tuple[int, ...]]] = []
    for row in rows:
        if batches and (len(batches[-1]) + 1) * len(row) <= batch_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
