"""Free continuations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_edit.errors import check_least
from lit_edit.files.checksum import hash_seed
from lit_edit.models.adapter import ModelAdapter
from lit_edit.text.tokens import encode, pad_token


def continue_greedily(adapter: ModelAdapter, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int) -> str:
    """Return the model's most probable continuation of a prompt, ``tokens`` tokens at most, without the prompt."""
    route = adapter.routes([prompt])[0]
    ids = torch.tensor([encode(tokenizer, route.context + prompt)], device=adapter.device)
    greedy: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    rows = (route.adapter or adapter).generate(ids, max_new_tokens=tokens, pad_token_id=pad_token(tokenizer), **greedy)
    return str(tokenizer.decode(rows[0, ids.shape[1] :], skip_special_tokens=True)).strip()


@torch.no_grad()
def continue_rows(
    adapter: ModelAdapter,
    rows: Sequence[Sequence[int]],
    new: Sequence[int],
    top_k: int = 1,
    seeds: Sequence[object] | None = None,
    batch_rows: int = 64,
    progress: Callable[[int, int], None] | None = None,
    look: Callable[[int, Tensor], None] | None = None,
) -> list[tuple[int, ...]]:
    """Continue many rows of tokens, greedily or by drawing, with the weights of this view.

    Rows run together without padding: a batch begins with the tokens that its shortest row has, and the longer ones are
    told theirs until they end, so that a row is continued as it would be alone, up to round-off. Each draws from random
    numbers of its own, which its seed decides: neither the other rows nor their order change a text.

    Args:
        adapter: The model.
        rows: Token ids, of any lengths above 0.
        new: Tokens to add to each row; none ends a row.
        top_k: Draw from this many of the most probable tokens; 1 takes the first choice.
        seeds: Of each row, anything printable; needed to draw.
        batch_rows: Rows that run together, at most.
        progress: Receives how many rows are done, of how many.
        look: Receives the number of a row and the logits ``(vocab,)`` of its first new token; each row is looked at by
            one rank.

    Returns:
        The new tokens of each row.

    Raises:
        ValueError: If there are not as many numbers, or seeds, as rows.
    """
    check_least(1, top_k=top_k)
    if len(new) != len(rows) or (top_k > 1 and (seeds is None or len(seeds) != len(rows))):
        raise ValueError(f"expected a number of new tokens, and to draw a seed, for each of {len(rows)} rows")
    batches: list[list[int]] = []
    for index in sorted((i for i in range(len(rows)) if new[i] > 0), key=lambda i: (len(rows[i]), new[i], i)):
        # Being told costs as many steps as writing: never more of them than the batch writes.
        told = len(rows[index]) - len(rows[batches[-1][0]]) if batches else 0
        if not batches or len(batches[-1]) == batch_rows or told > max(new[i] for i in batches[-1]):
            batches.append([])
        batches[-1].append(index)
    found = torch.zeros(len(rows), max(new, default=0), dtype=torch.long)
    ranks = adapter.ranks
    # In lockstep every rank has to run as many steps: batches of different lengths cannot be dealt out then.
    dealt = [(batch, ranks.leads) for batch in batches] if ranks.lockstep else ranks.deal(batches)
    done = 0
    for batch, counts in dealt:
        start = len(rows[batch[0]])
        choose = _first_choice if top_k == 1 else _drawer([seeds[i] for i in batch] if seeds else [], new, batch, top_k)
        ids = torch.tensor([list(rows[index][:start]) for index in batch], device=adapter.device)
        steps = max(len(rows[index]) + new[index] for index in batch) - start
        go_on = _told([rows[index][start:] for index in batch], choose, batch, look if counts else None)
        continued = adapter.go_on(ids, steps, go_on)[:, start:].cpu()
        for index, row in zip(batch, continued if counts else (), strict=False):
            told = len(rows[index]) - start
            found[index, : new[index]] = row[told : told + new[index]]
        done += len(batch)
        if progress is not None:
            progress(done, sum(len(part) for part, _ in dealt))
    ranks.sum_(found)
    return [tuple(row[:count]) for row, count in zip(found.tolist(), new, strict=True)]


def _told(
    rests: Sequence[Sequence[int]],
    choose: Callable[[Tensor, Tensor], Tensor],
    batch: Sequence[int],
    look: Callable[[int, Tensor], None] | None = None,
) -> Callable[[Tensor, int], Tensor]:
    """Return how a batch goes on: rows get the rest of their own tokens, then what ``choose`` makes of the logits.

    ``choose`` is also told how many tokens each row has written, and returns the next ones ``(batch, 1)``.
    """
    lengths = torch.tensor([len(rest) for rest in rests])
    tokens = torch.zeros(len(rests), max(map(len, rests)) + 1, dtype=torch.long)
    for row, rest in enumerate(rests):
        tokens[row, : len(rest)] = torch.tensor(rest, dtype=torch.long)

    def go_on(logits: Tensor, step: int) -> Tensor:
        if look is not None:
            for row in (lengths == step).nonzero().flatten().tolist():
                look(batch[row], logits[row])
        chosen = choose(logits, (step - lengths).clamp(min=0))
        if step >= tokens.shape[1] - 1:
            return chosen
        return torch.where((step < lengths)[:, None].to(chosen.device), tokens[:, step, None].to(chosen), chosen)

    return go_on


def _first_choice(logits: Tensor, written: Tensor) -> Tensor:
    return logits.argmax(-1, keepdim=True)


def _drawer(
    seeds: Sequence[object], new: Sequence[int], batch: Sequence[int], top_k: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return how rows choose their tokens: where the running sum of probabilities passes a number of the row's own."""
    numbers = torch.zeros(len(batch), max(new[index] for index in batch), dtype=torch.float64)
    for row, (seed, index) in enumerate(zip(seeds, batch, strict=True)):
        generator = torch.Generator().manual_seed(hash_seed(seed))
        numbers[row, : new[index]] = torch.rand(new[index], generator=generator, dtype=torch.float64)

    def draw(logits: Tensor, written: Tensor) -> Tensor:
        likely = logits.topk(min(top_k, logits.shape[-1]))
        number = numbers.gather(1, written.clamp(max=numbers.shape[1] - 1)[:, None])
        # A model that has collapsed may have no finite logits; the first token is taken then.
        passed = torch.softmax(likely.values.double(), -1).nan_to_num(1.0).cpu().cumsum(-1) <= number
        choice = passed.sum(-1, keepdim=True).clamp(max=likely.indices.shape[-1] - 1)
        return likely.indices.gather(1, choice.to(likely.indices.device))

    return draw
