"""Free continuations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_edit.models.adapter import ModelAdapter
from lit_edit.stats.corpus import hash_seed
from lit_edit.tokens import encode, pad_token


def continue_greedily(adapter: ModelAdapter, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int) -> str:
    """Return the model's most probable continuation of a prompt, ``tokens`` tokens at most, without the prompt."""
    ids = torch.tensor([encode(tokenizer, prompt)], device=adapter.device)
    greedy: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    rows = adapter.generate(ids, max_new_tokens=tokens, pad_token_id=pad_token(tokenizer), **greedy)
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
) -> list[tuple[int, ...]]:
    """Continue many rows of tokens, greedily or by drawing, with the weights of this view.

    Rows of one length run together, without padding, so that a row is continued as it would be alone. Each draws from
    random numbers of its own, which its seed decides: neither the other rows nor their order change a text.

    Args:
        adapter: The model.
        rows: Token ids, of any lengths above 0.
        new: Tokens to add to each row; none ends a row.
        top_k: Draw from this many of the most probable tokens; 1 takes the first choice.
        seeds: Of each row, anything printable; needed to draw.
        batch_rows: Rows that run together, at most.
        progress: Receives how many rows are done, of how many.

    Returns:
        The new tokens of each row.

    Raises:
        ValueError: If there are not as many numbers, or seeds, as rows.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if len(new) != len(rows) or (top_k > 1 and (seeds is None or len(seeds) != len(rows))):
        raise ValueError(f"expected a number of new tokens, and to draw a seed, for each of {len(rows)} rows")
    order = sorted((i for i in range(len(rows)) if new[i] > 0), key=lambda i: (len(rows[i]), new[i], i))
    batches: list[list[int]] = []
    for index in order:
        if not batches or len(batches[-1]) == batch_rows or len(rows[batches[-1][0]]) != len(rows[index]):
            batches.append([])
        batches[-1].append(index)
    found = torch.zeros(len(rows), max(new, default=0), dtype=torch.long)
    ranks = adapter.ranks
    # In lockstep every rank has to run as many steps: batches of different lengths cannot be dealt out then.
    dealt = [(batch, ranks.leads) for batch in batches] if ranks.lockstep else ranks.deal(batches)
    done = 0
    for batch, counts in dealt:
        steps = new[batch[-1]]
        choose = _first_choice if top_k == 1 else _drawer([seeds[i] for i in batch] if seeds else [], steps, top_k)
        ids = torch.tensor([list(rows[index]) for index in batch], device=adapter.device)
        continued = adapter.go_on(ids, steps, choose)[:, ids.shape[1] :].cpu()
        if counts:
            found[batch, :steps] = continued
        done += len(batch)
        if progress is not None:
            progress(done, sum(len(part) for part, _ in dealt))
    ranks.sum_(found)
    return [tuple(row[:count]) for row, count in zip(found.tolist(), new, strict=True)]


def _first_choice(logits: Tensor, step: int) -> Tensor:
    return logits.argmax(-1, keepdim=True)


def _drawer(seeds: Sequence[object], steps: int, top_k: int) -> Callable[[Tensor, int], Tensor]:
    """Return how rows choose their tokens: where the running sum of probabilities passes a number of the row's own."""
    numbers = torch.stack(
        [torch.rand(steps, generator=torch.Generator().manual_seed(hash_seed(s)), dtype=torch.float64) for s in seeds]
    )

    def draw(logits: Tensor, step: int) -> Tensor:
        likely = logits.topk(min(top_k, logits.shape[-1]))
        # A model that has collapsed may have no finite logits; the first token is taken then.
        passed = torch.softmax(likely.values.double(), -1).nan_to_num(1.0).cpu().cumsum(-1) <= numbers[:, step, None]
        choice = passed.sum(-1, keepdim=True).clamp(max=likely.indices.shape[-1] - 1)
        return likely.indices.gather(1, choice.to(likely.indices.device))

    return draw
