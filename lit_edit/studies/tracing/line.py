"""Many versions of one prompt, each run from its own position on, as one line of tokens.

Versions of a prompt differ in what was done to their states, never in their tokens. A version that begins at a position
attends to the kept attention keys and values of an earlier version (the corrupted run it departs from) for what comes
before; linear layers see all tokens of all versions as one line, and only attention looks at versions. The results
equal those of whole passes up to round-off.

A model whose attention does not go through transformers' interface (GPT-J) runs whole versions instead, padded by
nothing since all are of one length: the same results, without the gain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_edit.devices.algebra import without_autocast
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.packed import allowed_positions
from lit_edit.models.packed_attention import SHORT, packed_attention

KeyValues = tuple[Tensor, Tensor]
"""Attention keys and values of kept versions, each ``(heads, versions * length, head size)``."""


class PromptCalls:
    """How the model calls its layers on one prompt, ids ``(1, length)``, whatever was done to its states."""

    def __init__(self, adapter: ModelAdapter, ids: Tensor) -> None:
        self.adapter, self.length = adapter, ids.shape[1]
        mask = torch.ones_like(ids)
        _, self.calls = adapter.record_calls(ids, mask)
        masks = {id(call.get("attention_mask")): call.get("attention_mask") for call in self.calls.values()}
        self.allowed = {key: allowed_positions(value, mask)[0] for key, value in masks.items()}

    def arguments(self, layer: int, positions: Tensor) -> dict[str, Any]:
        """Return a layer's arguments for tokens at ``positions`` ``(tokens,)``; without mask and cache."""
        made: dict[str, Any] = {}
        for name, value in self.calls[layer].items():
            if name == "position_ids" and isinstance(value, Tensor):
                made[name] = value[:, positions]
            elif name == "position_embeddings" and value is not None:
                made[name] = tuple(table[:, positions] for table in value)
            elif name not in ("cache_position", "attention_mask"):
                made[name] = value
        return made


class PromptLine:
    """Versions of a prompt as one line of tokens.

    Args:
        calls: How the model calls its layers on the prompt.
        starts: Per version, the first position that it runs. Ignored (taken as 0) where whole versions are run.
        bases: Per version, the number of the kept version it departs from, whose states are found before ``starts``.
        kept: How many versions are kept.
        stops: Per version, the position behind the last that it runs; by default the prompt's length.

    Attributes:
        base: ``(tokens,)``, for each token of the line where the same token of its base lies among
            ``(versions * length)`` kept ones.
        ends: ``(versions,)``, where in the line each version's last token lies.
    """

    def __init__(
        self,
        calls: PromptCalls,
        starts: Sequence[int],
        bases: Sequence[int],
        kept: int,
        stops: Sequence[int] | None = None,
    ) -> None:
        self.calls, self.adapter, length = calls, calls.adapter, calls.length
        self.starts, self._bases, self._kept = starts, bases, kept
        device = self.adapter.device
        begin = torch.tensor(starts if self.adapter.packs else [0] * len(starts), device=device)
        end = torch.tensor([length] * len(starts) if stops is None else stops, device=device)
        base = torch.tensor(bases, device=device)
        self.versions, self.first = len(starts), int(begin.min())
        sizes = end - begin
        offsets = sizes.cumsum(0) - sizes
        position = torch.arange(length, device=device)
        own = offsets[:, None] + position - begin[:, None]  # (versions, length), where it is not negative
        runs = (position >= begin[:, None]) & (position < end[:, None])
        self._place = own  # of a token in the line; only where the version runs it
        self.positions = position.expand(self.versions, -1)[runs]  # (tokens,)
        self.base = (base[:, None] * length + position)[runs]
        self.ends = offsets + sizes - 1
        # For attention: queries padded to the longest version, keys of every position, kept ones first.
        self._keys = torch.where(runs, kept * length + own, base[:, None] * length + position).flatten()
        self._span = length - self.first
        self._queries = torch.where(runs, own, self.ends[:, None])[:, self.first :].flatten()
        row = torch.arange(self.versions, device=device)[:, None].expand(-1, length)[runs]
        self._answers = row * self._span + self.positions - self.first
        self._masks = {
            key: self.adapter.mask_like(allowed[None, None, self.first :]) for key, allowed in calls.allowed.items()
        }
        self._arguments: dict[tuple[int, ...], dict[str, Any]] = {}
        self._by_heads: dict[tuple[int, int], Tensor] = {}
        self._bars: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def __len__(self) -> int:
        return len(self.positions)

    def repeated(self, times: int) -> PromptLine:
        """Return a line of so many times the same versions, one line of them behind the other."""
        return PromptLine(self.calls, [*self.starts] * times, [*self._bases] * times, self._kept)

    def alone(self) -> PromptLine:
        """Return a line of the same versions that run their first position only; versions must not be run whole."""
        return PromptLine(self.calls, self.starts, self._bases, self._kept, [start + 1 for start in self.starts])

    def _queries_of(self, heads: int, groups: int) -> Tensor:
        """Return where each query of attention lies among ``(heads * tokens)``, by group of heads and version."""
        if (heads, groups) not in self._by_heads:
            first = torch.arange(heads, device=self.positions.device).view(groups, 1, -1, 1) * len(self)
            self._by_heads[heads, groups] = (first + self._queries.view(1, self.versions, 1, -1)).flatten()
        return self._by_heads[heads, groups]

    def _barred(self, mask: Tensor, shared: int, dtype: torch.dtype) -> Tensor:
        """Return what to add to scores ``(.., length, shared * span)``: nothing, or much below all of them."""
        key = (id(mask), shared, dtype)
        if key not in self._bars:
            barred = torch.zeros(mask.shape[2:], dtype=dtype, device=mask.device)
            barred.masked_fill_(~mask[0, 0], torch.finfo(dtype).min / 2)
            self._bars[key] = barred.T.repeat(1, shared)[None]
        return self._bars[key]

    def place(self, positions: Sequence[int]) -> Tensor:
        """Return where in the line each version's token at a position lies; the version must run it."""
        columns = torch.tensor(positions, device=self.adapter.device)
        return self._place.gather(1, columns[:, None]).squeeze(1)

    def run_layer(
        self, layer: int, hidden: Tensor, kept: KeyValues | None = None, keep: dict[int, KeyValues] | None = None
    ) -> Tensor:
        """Run one layer on ``(tokens, d_model)``.

        ``kept`` are its attention keys and values of the kept versions; ``keep`` receives those of this line, by layer.
        """
        call = self.calls.calls[layer]
        if not self.adapter.packs:
            rows = hidden.view(self.versions, self.calls.length, -1)
            return self.adapter.run_layer(layer, rows, call).reshape(len(self), -1)
        key = tuple(id(value) for value in call.values())
        if key not in self._arguments:
            self._arguments[key] = self.calls.arguments(layer, self.positions)
        attention = _Attention(self, self._masks[id(call.get("attention_mask"))], kept)
        arguments: Mapping[str, Any] = self._arguments[key] | {"attention_mask": attention}
        with packed_attention(self.adapter):
            hidden = self.adapter.run_layer(layer, hidden[None], arguments)[0]
        if keep is not None:
            keep[layer] = attention.own
        return hidden


class _Attention:
    """Stands where a layer expects its mask; :mod:`lit_edit.models.packed_attention` hands attention over to it."""

    def __init__(self, line: PromptLine, mask: Tensor, kept: KeyValues | None) -> None:
        self.line, self.mask, self.kept = line, mask, kept
        self.attention = line.adapter.attention

    def attend(
        self,
        inner: Any,
        by_formula: bool,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        **kwargs: Any,
    ) -> Tensor:
        """Attention over the line: ``(1, heads, tokens, size)`` to ``(1, tokens, heads, size)``."""
        line = self.line
        self.own = (key[0], value[0])
        keys, values = self.own
        if self.kept is not None:
            keys, values = torch.cat([self.kept[0], keys], 1), torch.cat([self.kept[1], values], 1)
        if by_formula and self.mask.shape[-1] <= SHORT:
            return _attend(line, self.mask, query[0], keys, values, kwargs.get("scaling"))[None]
        rows = [_rows(query[0], line._queries, line.versions)]
        rows += [_rows(side, line._keys, line.versions) for side in (keys, values)]
        output, _ = inner(module, *rows, self.mask, **kwargs)  # (versions, span, heads, size)
        answers: Tensor = output.flatten(0, 1).index_select(0, line._answers)
        return answers[None]


def _rows(tokens: Tensor, index: Tensor, versions: int) -> Tensor:
    """Lay ``(heads, tokens, size)`` out by version: ``(versions, heads, time, size)``."""
    heads, _, size = tokens.shape
    return tokens.index_select(1, index).view(heads, versions, -1, size).transpose(0, 1)


def _attend(line: PromptLine, mask: Tensor, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Attention by its formula. The softmax runs over a dimension that is not the last: of few keys that is faster.

    ``mask`` are booleans ``(1, 1, span, length)``, ``query`` is ``(heads, tokens, size)``, ``key`` and ``value`` are
    ``(groups of heads, kept and own tokens, size)``; returned is ``(tokens, heads, size)``.
    """
    heads, _, size = query.shape
    groups, shared, versions = key.shape[0], query.shape[0] // key.shape[0], line.versions
    dtype = torch.float32 if query.itemsize < 4 else query.dtype  # autocast leaves values shorter than queries
    # Heads of a group are further queries to the same keys: (groups * versions, shared * span, size).
    rows = query.reshape(-1, size).index_select(0, line._queries_of(heads, groups)).to(dtype)
    rows = rows.view(groups * versions, -1, size)
    keys, values = (
        side.to(dtype).index_select(1, line._keys).view(groups * versions, -1, side.shape[2]) for side in (key, value)
    )
    barred = line._barred(mask, shared, dtype)
    with without_autocast(query.device):
        # (groups * versions, length, shared * span)
        scores = torch.baddbmm(barred, keys, rows.transpose(1, 2), alpha=size**-0.5 if scaling is None else scaling)
        seen = torch.bmm(torch.softmax(scores, 1).transpose(1, 2), values)
    seen = seen.view(groups, versions, shared, -1, values.shape[2]).permute(1, 3, 0, 2, 4)
    answers: Tensor = seen.reshape(-1, heads, values.shape[2]).index_select(0, line._answers)
    return answers.to(value.dtype)
