"""Key statistics: seconds per 1,000 tokens, against a plain pass with hooks.

    python benchmarks/key_statistics.py --json statistics.json

The plain pass runs the whole model on padded rows in the order they come, logits included, and adds up outer products
of what hooks on the edited layers see. Ours leaves the pass at the highest edited layer and sorts rows by length. Both
add up in float64 and see the same rows (sampled once, cut to lengths of 8 to 64 tokens); the results are compared. The
sampling itself, batched with a key-value cache, is timed apart.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from common import add_model, load_model, make_parser, write_result

from lit_edit import D4S
from lit_edit.models import ModelAdapter
from lit_edit.stats.corpus import SampledText
from lit_edit.stats.second_moment import accumulate
from lit_edit.text.tokens import pad_right, pad_token


class Rows:
    """A corpus of given rows."""

    def __init__(self, rows: list[list[int]], per_chunk: int) -> None:
        self.rows, self.per_chunk = rows, per_chunk

    def chunk(self, index: int, *_: Any) -> list[list[int]]:
        return self.rows[index * self.per_chunk : (index + 1) * self.per_chunk]

    def fingerprint(self) -> str:
        return "rows"


def plain_pass(
    adapter: ModelAdapter, layers: Sequence[int], rows: list[list[int]], pad: int, batch: int = 32
) -> dict[int, torch.Tensor]:
    torch.set_grad_enabled(False)
    sums = {n: torch.zeros(*[adapter.shape(n)[1]] * 2, dtype=torch.float64) for n in layers}
    found: dict[int, torch.Tensor] = {}
    hooks = [
        adapter.down_proj(n).register_forward_pre_hook(lambda module, args, n=n: found.update({n: args[0]}))
        for n in layers
    ]
    for first in range(0, len(rows), batch):
        ids, mask = pad_right(rows[first : first + batch], pad, adapter.device)
        adapter.model(input_ids=ids, attention_mask=mask)
        for n in layers:
            keys = found[n].reshape(*ids.shape, -1)[mask.bool()].double()
            sums[n] += keys.T @ keys
    for hook in hooks:
        hook.remove()
    count = sum(map(len, rows))
    return {n: total / count for n, total in sums.items()}


def main() -> None:
    parser = make_parser(__doc__)
    add_model(parser)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2, help="the two passes take turns so often")
    options = parser.parse_args()

    adapter, tokenizer = load_model(options.model)
    layers = D4S().resolve_layers(adapter)
    shipped = SampledText()
    start = perf_counter()
    made = shipped.chunk(0, adapter, tokenizer)
    sampling = (perf_counter() - start) / sum(map(len, made)) * 1000
    long = SampledText(rows=options.rows, length=64).chunk(0, adapter, tokenizer)
    cut = random.Random(0)
    rows = [row[: cut.randint(8, 64)] for row in long]
    tokens = sum(map(len, rows))

    best = {"plain": float("inf"), "ours": float("inf")}
    for _ in range(options.rounds):
        start = perf_counter()
        plain = plain_pass(adapter, layers, rows, pad_token(tokenizer))
        best["plain"] = min(best["plain"], perf_counter() - start)
        with tempfile.TemporaryDirectory() as folder:
            start = perf_counter()
            ours = accumulate(adapter, tokenizer, layers, Rows(rows, len(rows)), tokens, False, Path(folder))
            best["ours"] = min(best["ours"], perf_counter() - start)
    difference = max(float((ours[n] - plain[n]).norm() / plain[n].norm()) for n in layers)
    seconds = {name: spent / tokens * 1000 for name, spent in best.items()}
    ratio = seconds["plain"] / seconds["ours"]
    print(f"{len(layers)} layers of {adapter.shape(layers[0])[1]}, {len(rows)} rows, {tokens} tokens")
    print(f"plain pass with hooks   {seconds['plain']:7.2f} s per 1,000 tokens")
    print(f"lit-edit                {seconds['ours']:7.2f} s per 1,000 tokens   {ratio:.1f}x")
    print(f"sampling the text       {sampling:7.2f} s per 1,000 tokens")
    print(f"largest relative difference of the results: {difference:.1e}")
    result = {
        "seconds_per_1000_tokens": {**seconds, "sampling": sampling},
        "ratio": ratio,
        "max_relative_difference": difference,
    }
    write_result(options.json, result)


if __name__ == "__main__":
    main()
