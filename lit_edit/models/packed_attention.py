"""Attention over a line of packed tokens: it alone looks at rows, padded to blocks of similar length.

It is reached through transformers' attention interface: inside :func:`packed_attention` a layer hands its queries, keys
and values to the object that stands where it expects its mask, to its ``attend``. On a CPU short rows attend by the
formula, which is several times as fast there as the fused kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lit_edit.models.adapter import ModelAdapter

KeyValues = MutableMapping[int, tuple[Tensor, Tensor]]
"""Attention keys and values by layer, each ``(tokens, heads, head size)``."""

SHORT = 128
"""Rows up to so many tokens attend by the formula on a CPU."""

_NAME = "lit_edit_packed"


@dataclass(frozen=True)
class RowBlock:
    """Rows whose attention is computed together, padded.

    Attributes:
        tokens: How many tokens of the line are the block's own; they lie one behind the other.
        span: Own tokens of a row, padded.
        slots: ``(rows * span,)``, the block's token in each padded place.
        place: ``(tokens,)``, the padded place of each token.
        prefix: ``(rows * length,)``, where keys and values of what comes before the own tokens are found: in those
            kept from the line behind, followed by those of this line.
        shares: Whether some of them are found in this line.
        masks: By kind of mask, ``(rows, 1, span, length + span)``.
    """

    rows: int
    span: int
    tokens: int
    slots: Tensor
    place: Tensor
    prefix: Tensor
    shares: bool
    masks: Mapping[int, Tensor]
    by_head: dict[tuple[int, int, int], _ByHead] = field(default_factory=dict)

    def pad(self, tokens: Tensor) -> Tensor:
        """``(tokens, ...)`` to ``(rows, span, ...)``."""
        padded: Tensor = _Gather.apply(tokens, self.slots, self.place)
        return padded.view(self.rows, self.span, *tokens.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        """``(rows, span, ...)`` to ``(tokens, ...)``."""
        tokens: Tensor = _Scatter.apply(padded.reshape(self.rows * self.span, *padded.shape[2:]), self.place)
        return tokens

    def layout(self, heads: int, groups: int, kept: int) -> _ByHead:
        """Return where vectors lie for so many heads, groups of heads that share keys, and kept tokens."""
        if (heads, groups, kept) not in self.by_head:
            self.by_head[heads, groups, kept] = _ByHead.of(self, heads, groups, kept)
        return self.by_head[heads, groups, kept]

    def before(self, kept: Tensor) -> Tensor:
        """Keys or values ``(rows, length, heads, head size)`` of what comes before the block's own tokens."""
        return kept.index_select(0, self.prefix).view(self.rows, -1, *kept.shape[1:])


class AttentionCall:
    """What attention must know about a layer's pass over a line; stands where the layer expects its mask.

    Not a dataclass: FSDP would take it apart for the tensors in it. ``kind`` says which of the blocks' masks it has,
    ``kept`` are keys and values of what comes before the line, and ``keep`` receives those of the line, by layer.
    """

    def __init__(
        self,
        blocks: Sequence[RowBlock],
        kind: int,
        attention: str,
        layer: int,
        kept: tuple[Tensor, Tensor] | None,
        keep: KeyValues | None,
    ) -> None:
        self.blocks, self.kind, self.attention = blocks, kind, attention
        self.layer, self.kept, self.keep = layer, kept, keep
        self._stored: list[tuple[Tensor, Tensor]] = []

    def attend(
        self,
        inner: Any,
        by_formula: bool,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attention over a line: ``(1, heads, tokens, size)`` to ``(1, tokens, heads, size)``."""
        queries, keys, values = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (tokens, heads, size)
        if self.keep is not None:
            self.keep[self.layer] = (keys, values)
        parts = zip(*(x.split([block.tokens for block in self.blocks]) for x in (queries, keys, values)), strict=True)
        outputs = []
        for block, part in zip(self.blocks, parts, strict=True):
            before, mask = self._before(block, keys, values), block.masks[self.kind]
            if by_formula and block.span <= SHORT:
                outputs.append(_attend_by_head(block, part, before, mask, scaling))
                continue
            rows = [block.pad(x) for x in part]
            if before is not None:
                rows[1:] = [torch.cat([block.before(x), y], 1) for x, y in zip(before, rows[1:], strict=True)]
            output, _ = inner(module, *(x.transpose(1, 2) for x in rows), mask, scaling=scaling, **kwargs)
            outputs.append(block.unpad(output))
        return outputs[0][None] if len(outputs) == 1 else torch.cat(outputs)[None]

    def _before(self, block: RowBlock, *own: Tensor) -> tuple[Tensor, ...] | None:
        """Return the keys and values that :attr:`RowBlock.prefix` points into, if it points at any."""
        if not len(block.prefix):
            return None
        if not block.shares or self.kept is None:
            return own if block.shares else self.kept
        return tuple(torch.cat(pair) for pair in zip(self.kept, own, strict=True))

    def store(self, block: RowBlock, keys: Tensor, values: Tensor) -> None:
        """Take in the keys and values of a padded block, ``(rows, heads, span, size)``."""
        self._stored.append((block.unpad(keys.transpose(1, 2)), block.unpad(values.transpose(1, 2))))

    def store_padded(self) -> None:
        """Keep what was taken in, block by block."""
        if self.keep is not None:
            keys, values = zip(*self._stored, strict=True)
            self.keep[self.layer] = (torch.cat(keys), torch.cat(values))


class RowCache:
    """Stands in for a transformers cache in a padded block: puts what is kept in front, and notes what is new."""

    def __init__(self, call: AttentionCall, block: RowBlock) -> None:
        self._call, self._block = call, block

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in the block's own keys and values, and return all."""
        call, block = self._call, self._block
        call.store(block, keys, values)
        if call.kept is None or not len(block.prefix):
            return keys, values
        before = [block.before(kept).transpose(1, 2) for kept in call.kept]
        return torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens come before."""
        return len(self._block.prefix) // self._block.rows


@dataclass(frozen=True)
class _ByHead:
    """Where queries and keys of a block lie when heads come first: matrix products then copy nothing.

    Queries of heads that share keys (grouped queries) are further queries to the same keys. Places are counted in
    vectors of one head.

    Attributes:
        queries: ``(groups * rows * heads per group * span,)``, the block's ``token * heads + head`` in each place.
        query_place: ``(tokens * heads,)``, the place of each.
        keys: ``(groups * rows * (length + span),)``, likewise in kept keys followed by the block's own.
        key_place: ``(tokens * groups,)``, the place of each of the block's own.
    """

    queries: Tensor
    query_place: Tensor
    keys: Tensor
    key_place: Tensor

    @classmethod
    def of(cls, block: RowBlock, heads: int, groups: int, kept: int) -> _ByHead:
        rows, span, device = block.rows, block.span, block.slots.device
        shared, length = heads // groups, len(block.prefix) // block.rows
        head, group = torch.arange(heads, device=device), torch.arange(groups, device=device)
        slots = block.slots.view(1, rows, 1, span)
        queries = slots * heads + head.view(groups, 1, shared, 1)
        row, column = block.place // span, block.place % span
        place = (head // shared * rows + row[:, None]) * shared + head % shared
        where = torch.cat([block.prefix.view(rows, length), kept + block.slots.view(rows, span)], 1)
        keys = where[None] * groups + group[:, None, None]
        key_place = (group * rows + row[:, None]) * (length + span) + length + column[:, None]
        query_place = place * span + column[:, None]
        return cls(queries.flatten(), query_place.flatten(), keys.flatten(), key_place.flatten())


def _attend_by_head(
    block: RowBlock,
    part: Sequence[Tensor],
    kept: tuple[Tensor, ...] | None,
    mask: Tensor,
    scaling: float | None,
) -> Tensor:
    """Attention by its formula over a block: ``(tokens, heads, size)`` from queries, keys and values of that shape.

    ``kept`` are keys and values of what comes before; the mask is ``(rows, 1, span, length + span)``.
    """
    query, key, value = part
    tokens, heads, size = query.shape
    groups, width = key.shape[1], value.shape[2]
    layout = block.layout(heads, groups, 0 if kept is None else len(kept[0]))
    batch, span = groups * block.rows, block.span
    query = query * (size**-0.5 if scaling is None else scaling)
    queries = _Gather.apply(query.reshape(-1, size), layout.queries, layout.query_place).view(batch, -1, size)
    sides = []
    for own, old in zip((key, value), kept or (key[:0], value[:0]), strict=True):
        flat, before = own.reshape(-1, own.shape[2]), old.reshape(-1, own.shape[2])
        if block.shares:  # what comes before has a gradient too
            gathered = torch.cat([before, flat]).index_select(0, layout.keys)
        else:
            gathered = _Gather.apply(flat, layout.keys, layout.key_place, before)
        sides.append(gathered.view(batch, -1, own.shape[2]))
    scores = torch.bmm(queries, sides[0].transpose(1, 2)).view(groups, block.rows, heads // groups, span, -1)
    scores = scores.masked_fill(~mask[None], torch.finfo(scores.dtype).min)
    shares = torch.softmax(scores, -1, dtype=torch.float32 if scores.itemsize < 4 else scores.dtype)
    seen = torch.bmm(shares.view(batch, -1, shares.shape[-1]).to(sides[1].dtype), sides[1])
    out: Tensor = _Scatter.apply(seen.view(-1, width), layout.query_place)
    return out.view(tokens, heads, width)


class _Gather(torch.autograd.Function):
    """``cat(old, own)[index]`` where ``own`` alone has a gradient, and each row of it one real place."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, index: Tensor, place: Tensor, old: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(place)
        return (own if old is None or not len(old) else torch.cat([old.to(own.dtype), own])).index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None, None


class _Scatter(torch.autograd.Function):
    """``padded[place]``; the gradient of padding is zero."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.slots = padded.shape[0]
        return padded.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros(ctx.slots, *grad.shape[1:]).index_copy_(0, ctx.saved_tensors[0], grad), None


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    eager = sys.modules[type(module).__module__].__dict__["eager_attention_forward"]
    inner = ALL_ATTENTION_FUNCTIONS.get_interface(attention_mask.attention, eager)
    by_formula = attention_mask.attention == "sdpa" and query.device.type == "cpu" and not kwargs.get("softcap")
    return attention_mask.attend(inner, by_formula, module, query, key, value, **kwargs), None


AttentionInterface.register(_NAME, _attention)


@contextmanager
def packed_attention(adapter: ModelAdapter) -> Iterator[None]:
    """Let the model's attention understand lines, inside this context."""
    before = [(config, config._attn_implementation_internal) for config in adapter.layer_configs]
    try:
        for config, _ in before:
            config._attn_implementation_internal = _NAME
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name
