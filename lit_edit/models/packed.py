"""Rows of tokens run as one line: nothing is padded, and what rows have in common is computed once.

In a causal model the state of a token depends on the tokens before it and on nothing else. Rows that begin alike
therefore share states (they form a tree), and a pass may start in the middle of its rows when the attention keys and
values of what comes before are kept. Linear layers, where the time goes, see one long line of tokens; only attention
looks at rows, padded to blocks of similar length. The results equal those of an ordinary padded pass up to round-off.

Attention is reached through transformers' attention interface. A model whose code does not use it (GPT-J) runs its
layers on the padded blocks instead: the same interface here, without the gain.
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
from lit_edit.models.passes import CACHE_NAMES
from lit_edit.models.structure import UnknownArchitectureError
from lit_edit.text.buckets import partition_by_length
from lit_edit.text.tokens import pad_right

KeyValues = MutableMapping[int, tuple[Tensor, Tensor]]
"""Attention keys and values by layer, each ``(tokens, heads, head size)``."""

_NAME = "lit_edit_packed"
_SHORT = 128  # rows up to so many tokens attend by the formula on a CPU
_BLOCK_OVERHEAD = 256  # what one more block costs in attention, in padded tokens


class TokenRows:
    """The distinct tokens of some rows, with all that the model's layers want to know about them.

    Args:
        adapter: The model (or a view of it).
        rows: Token ids, none empty.
        pad: Any token id.
        share: Up to which position a row may share tokens with others; everywhere by default.

    Attributes:
        paths: Per row, the node (distinct token) at each position.
        hidden: ``(nodes, d_model)``, the input of the first layer.
    """

    def __init__(
        self, adapter: ModelAdapter, rows: Sequence[Sequence[int]], pad: int, share: Sequence[int] | None = None
    ) -> None:
        self.adapter = adapter
        ids, mask = pad_right(rows, pad, adapter.device)
        hidden, self.calls = adapter.record_calls(ids, mask)
        self.allowed = {key: allowed_positions(m, mask) for key, m in _by_id(self.calls, "attention_mask").items()}
        caps = [0] * len(rows) if not adapter.packs else [len(row) for row in rows] if share is None else list(share)
        self.paths: list[list[int]] = [[] for _ in rows]
        places: list[tuple[int, int]] = []
        previous: list[int] = []  # path of the row before, as far as it may be shared
        before: tuple[int, ...] = ()
        # Sorted, a row has its longest common beginning with the row just before it.
        for row in sorted(range(len(rows)), key=lambda r: tuple(rows[r][: caps[r]])):
            text = tuple(rows[row])
            common = _common(text[: caps[row]], before)
            fresh = range(len(places), len(places) + len(text) - common)
            places += [(row, position) for position in range(common, len(text))]
            self.paths[row] = previous[:common] + list(fresh)
            previous, before = self.paths[row][: caps[row]], text[: caps[row]]
        at = torch.tensor(places, device=hidden.device)
        self._row, self._position = at[:, 0], at[:, 1]
        self.hidden = hidden[self._row, self._position]

    def line(
        self,
        rows: Sequence[int] | None = None,
        starts: Sequence[int] | None = None,
        stops: Sequence[int] | None = None,
        behind: Line | None = None,
    ) -> Line:
        """Lay some rows, or parts of them, out as a line.

        Args:
            rows: Which rows; all by default.
            starts: First position to run of each row; what comes before must be in ``behind``.
            stops: Position behind the last one of each row.
            behind: The line that has run what comes before.
        """
        rows = range(len(self.paths)) if rows is None else rows
        begin = [0] * len(rows) if starts is None else starts
        end = [len(self.paths[row]) for row in rows] if stops is None else stops
        return Line(self, list(zip(rows, begin, end, strict=True)), behind)

    def arguments(self, layer: int, row: Tensor, position: Tensor) -> dict[str, Any]:
        """Return a layer's arguments for tokens at ``(row, position)``, any shape; without mask and cache."""
        made: dict[str, Any] = {}
        for name, value in self.calls[layer].items():
            if name == "position_ids" and isinstance(value, Tensor):
                made[name] = value[row if value.shape[0] > 1 else 0, position]
            elif name == "position_embeddings" and value is not None:
                made[name] = tuple(table[row if table.shape[0] > 1 else 0, position] for table in value)
            elif name != "cache_position":
                made[name] = value
        return made

    def places(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the row and the position at which each node stands for the first time."""
        return self._row[nodes], self._position[nodes]


@dataclass(frozen=True)
class _Block:
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

    def before(self, kept: Tensor) -> Tensor:
        """Keys or values ``(rows, length, heads, head size)`` of what comes before the block's own tokens."""
        return kept.index_select(0, self.prefix).view(self.rows, -1, *kept.shape[1:])


class Line:
    """Tokens of some rows, one behind the other, ready to run. Made by :meth:`TokenRows.line`.

    Attributes:
        nodes: ``(tokens,)``, the node of each token.
    """

    def __init__(self, source: TokenRows, parts: Sequence[tuple[int, int, int]], behind: Line | None) -> None:
        self.source, self.adapter, self.behind = source, source.adapter, behind
        device = source.hidden.device
        # A node is run by the first row that has it. In this order what a row finds done is always its beginning.
        own: list[tuple[int, int, int]] = []
        here: set[int] = set()
        for row, start, stop in sorted(parts, key=lambda part: (part[1], source.paths[part[0]][: part[2]])):
            path = source.paths[row]
            first = next((p for p in range(start, stop) if path[p] not in here), stop)
            if first < stop:
                own.append((row, first, stop))
                here.update(path[first:stop])
        groups = partition_by_length([stop - start for _, start, stop in own], _BLOCK_OVERHEAD)
        nodes = [n for group in groups for i in group for n in source.paths[own[i][0]][own[i][1] : own[i][2]]]
        self.nodes = torch.tensor(nodes, dtype=torch.long, device=device)
        self.index_of = {node: index for index, node in enumerate(nodes)}
        self._blocks = [self._block([own[i] for i in group]) for group in groups]
        self._arguments: dict[tuple[int, ...], dict[str, Any]] = {}
        self._padded: dict[tuple[int, int], dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.nodes)

    @property
    def hidden(self) -> Tensor:
        """``(tokens, d_model)``, the input of the first layer."""
        return self.source.hidden[self.nodes]

    def index(self, row: int, position: int) -> int:
        """Return where in the line a row's token stands."""
        return self.index_of[self.source.paths[row][position]]

    def carry(self, values: Tensor, to: Line) -> Tensor:
        """Return ``(tokens of the other line, ...)`` of values ``(tokens, ...)``; the other's tokens must be here."""
        return values[torch.tensor([self.index_of[node] for node in to.nodes.tolist()], device=values.device)]

    def run(
        self,
        hidden: Tensor,
        start: int,
        stop: int,
        kept: Mapping[int, tuple[Tensor, Tensor]] | None = None,
        keep: KeyValues | None = None,
        keys: MutableMapping[int, Tensor] | None = None,
        adapter: ModelAdapter | None = None,
    ) -> Tensor:
        """Run layers ``start .. stop - 1``.

        Args:
            hidden: ``(tokens, d_model)``.
            start: First layer.
            stop: Layer behind the last.
            kept: Attention keys and values of the line behind.
            keep: Receives those of this line.
            keys: Receives, by layer, the inputs of the down projection ``(tokens, d_in)``.
            adapter: The view to run on, when it is not the one that the rows were made with.

        Returns:
            ``(tokens, d_model)``.
        """
        if not len(self):
            return hidden
        adapter = adapter or self.adapter
        run = self._run_packed if adapter.packs else self._run_padded
        with packed_attention(adapter) if adapter.packs else _nothing():
            for layer in range(start, stop):
                call = _Call(self, layer, (kept or {}).get(layer), keep)
                with adapter.record_keys([layer]) as found:
                    hidden, down_inputs = run(adapter, layer, hidden, call, found)
                if keys is not None:
                    keys[layer] = down_inputs
        return hidden

    def _run_packed(
        self, adapter: ModelAdapter, layer: int, hidden: Tensor, call: _Call, found: Mapping[int, Tensor]
    ) -> tuple[Tensor, Tensor]:
        key = tuple(id(value) for value in self.source.calls[layer].values())
        if key not in self._arguments:
            row, position = self.source.places(self.nodes)
            self._arguments[key] = self.source.arguments(layer, row[None], position[None])
        arguments = self._arguments[key] | {"attention_mask": call}
        return adapter.run_layer(layer, hidden[None], arguments).squeeze(0), found[layer].reshape(len(self), -1)

    def _run_padded(
        self, adapter: ModelAdapter, layer: int, hidden: Tensor, call: _Call, found: Mapping[int, Tensor]
    ) -> tuple[Tensor, Tensor]:
        outputs, down_inputs, first = [], [], 0
        for number, block in enumerate(self._blocks):
            part = hidden[first : first + block.tokens]
            row, position = self.source.places(self.nodes[first : first + block.tokens])
            if (number, layer) not in self._padded:
                slots = block.slots.view(block.rows, block.span)
                self._padded[number, layer] = self.source.arguments(layer, row[slots], position[slots])
            cache = _RowCache(call, block)
            arguments = self._padded[number, layer] | {"attention_mask": call.mask(block)}
            arguments |= {name: cache for name in CACHE_NAMES if name in arguments}
            outputs.append(block.unpad(adapter.run_layer(layer, block.pad(part), arguments)))
            down_inputs.append(block.unpad(found[layer].reshape(block.rows, block.span, -1)))
            first += block.tokens
        call.store_padded()
        return torch.cat(outputs), torch.cat(down_inputs)

    def _block(self, own: Sequence[tuple[int, int, int]]) -> _Block:
        """Lay out rows ``(row, first own position, stop)``."""
        paths, device = self.source.paths, self.nodes.device
        span, length = max(stop - start for _, start, stop in own), max(start for _, start, _ in own)
        cached = {} if self.behind is None else self.behind.index_of
        offset = len(cached)
        slots: list[int] = []
        place: list[int] = []
        prefix: list[int] = []
        columns: list[list[int]] = []
        real: list[list[bool]] = []
        count = 0
        for number, (row, start, stop) in enumerate(own):
            path, size = paths[row], stop - start
            slots += [count + min(i, size - 1) for i in range(span)]
            place += range(number * span, number * span + size)
            # Kept keys come first; a token of the same line, run by another row, is found behind them.
            where = [cached[n] if n in cached else offset + self.index_of[n] for n in path[:start]]
            prefix += where + [0] * (length - start)  # masked
            columns.append([*range(start), *[0] * (length - start), *[min(start + i, stop - 1) for i in range(span)]])
            real.append([*[True] * start, *[False] * (length - start), *[i < size for i in range(span)]])
            count += size
        column, is_real = torch.tensor(columns, device=device), torch.tensor(real, device=device)
        query = column[:, length:]
        # A padding column is seen by itself alone, so that no softmax is empty.
        itself = torch.zeros(1, span, length + span, dtype=torch.bool, device=device)
        itself[0, :, length:] = torch.eye(span, dtype=torch.bool, device=device)
        chosen = torch.tensor([row for row, _, _ in own], device=device)
        masks = {}
        for kind, allowed in self.source.allowed.items():
            seen = allowed[chosen[:, None, None], query[:, :, None], column[:, None, :]]
            masks[kind] = self.adapter.mask_like((seen & is_real[:, None, :] | itself)[:, None])
        index = [torch.tensor(values, dtype=torch.long, device=device) for values in (slots, place, prefix)]
        shares = any(p >= offset for p in prefix)
        return _Block(len(own), span, count, index[0], index[1], index[2], shares, masks)


class _Call:
    """What attention must know about one layer's pass over a line; stands where the layer expects its mask."""

    def __init__(self, line: Line, layer: int, kept: tuple[Tensor, Tensor] | None, keep: KeyValues | None) -> None:
        self.line, self.layer, self.kept, self.keep = line, layer, kept, keep
        self.kind = id(line.source.calls[layer].get("attention_mask"))
        self._stored: list[tuple[Tensor, Tensor]] = []

    def mask(self, block: _Block) -> Tensor:
        return block.masks[self.kind]

    def attend(self, inner: Any, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        """Attention over a line: ``(1, heads, tokens, size)`` to ``(1, tokens, heads, size)``."""
        queries, keys, values = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (tokens, heads, size)
        if self.keep is not None:
            self.keep[self.layer] = (keys, values)
        blocks = self.line._blocks
        sizes = [block.tokens for block in blocks]
        parts = zip(*(x.split(sizes) for x in (queries, keys, values)), strict=True)
        outputs = []
        for block, part in zip(blocks, parts, strict=True):
            if inner is _short_attention and block.span <= _SHORT and not block.shares:
                outputs.append(_attend_by_head(block, part, self.kept, self.mask(block), kwargs.get("scaling")))
                continue
            rows = [block.pad(x) for x in part]
            if len(block.prefix):
                rows[1] = torch.cat([block.before(self._sources(block, 0, keys)), rows[1]], 1)
                rows[2] = torch.cat([block.before(self._sources(block, 1, values)), rows[2]], 1)
            output, _ = inner(module, *(x.transpose(1, 2) for x in rows), self.mask(block), **kwargs)
            outputs.append(block.unpad(output))
        return outputs[0][None] if len(outputs) == 1 else torch.cat(outputs)[None]

    def _sources(self, block: _Block, which: int, own: Tensor) -> Tensor:
        """Return the keys or values that :attr:`_Block.prefix` points into."""
        if self.kept is None:
            return own
        return torch.cat([self.kept[which], own]) if block.shares else self.kept[which]

    def store(self, block: _Block, keys: Tensor, values: Tensor) -> None:
        self._stored.append((block.unpad(keys.transpose(1, 2)), block.unpad(values.transpose(1, 2))))

    def store_padded(self) -> None:
        if self.keep is not None:
            keys, values = zip(*self._stored, strict=True)
            self.keep[self.layer] = (torch.cat(keys), torch.cat(values))


class _RowCache:
    """Stands in for a transformers cache in a padded block: puts what is kept in front, and notes what is new."""

    def __init__(self, call: _Call, block: _Block) -> None:
        self._call, self._block = call, block

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        call, block = self._call, self._block
        call.store(block, keys, values)
        if call.kept is None or not len(block.prefix):
            return keys, values
        before = [block.before(kept).transpose(1, 2) for kept in call.kept]
        return torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
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
    def of(cls, block: _Block, heads: int, groups: int, kept: int) -> _ByHead:
        """Lay out a block for so many heads, groups of heads that share keys, and kept tokens."""
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
    block: _Block,
    part: Sequence[Tensor],
    kept: tuple[Tensor, Tensor] | None,
    mask: Tensor,
    scaling: float | None,
) -> Tensor:
    """Attention by its formula over a block; on short rows several times as fast on a CPU as the fused kernel.

    Args:
        block: The rows.
        part: Queries, keys and values of the block's tokens, each ``(tokens, heads, size)``.
        kept: Keys and values of what comes before.
        mask: ``(rows, 1, span, length + span)``.
        scaling: Of the scores.

    Returns:
        ``(tokens, heads, size)``.
    """
    query, key, value = part
    tokens, heads, size = query.shape
    groups, width = key.shape[1], value.shape[2]
    before = 0 if kept is None else len(kept[0])
    if (heads, groups, before) not in block.by_head:
        block.by_head[heads, groups, before] = _ByHead.of(block, heads, groups, before)
    layout = block.by_head[heads, groups, before]
    batch, span = groups * block.rows, block.span
    query = query * (size**-0.5 if scaling is None else scaling)
    queries = _Gather.apply(query.reshape(-1, size), layout.queries, layout.query_place).view(batch, -1, size)
    sides = []
    for own, old in zip((key, value), kept or (key[:0], value[:0]), strict=True):
        flat = own.reshape(-1, own.shape[2])
        sides.append(
            _GatherBehind.apply(flat, old.reshape(-1, own.shape[2]), layout.keys, layout.key_place)
            .view(batch, -1, own.shape[2])
        )  # fmt: skip
    scores = torch.bmm(queries, sides[0].transpose(1, 2)).view(groups, block.rows, heads // groups, span, -1)
    scores = scores.masked_fill(~mask[None], torch.finfo(scores.dtype).min)
    shares = torch.softmax(scores, -1, dtype=torch.float32 if scores.itemsize < 4 else scores.dtype)
    seen = torch.bmm(shares.view(batch, -1, shares.shape[-1]).to(sides[1].dtype), sides[1])
    out: Tensor = _Scatter.apply(seen.view(-1, width), layout.query_place)
    return out.view(tokens, heads, width)


class _GatherBehind(torch.autograd.Function):
    """``cat(old, own)[index]`` where ``own`` alone has a gradient, and each row of it one real place."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, old: Tensor, index: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return (torch.cat([old.to(own.dtype), own]) if len(old) else own).index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None, None


class _Gather(torch.autograd.Function):
    """``tokens[slots]`` where the gradient of a token is that of its one real slot: a gather, not a sum."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, slots: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return tokens.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


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
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: _Call, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    eager = sys.modules[type(module).__module__].__dict__["eager_attention_forward"]
    inner = ALL_ATTENTION_FUNCTIONS.get_interface(attention_mask.line.adapter.attention, eager)
    if attention_mask.line.adapter.attention == "sdpa" and query.device.type == "cpu" and not kwargs.get("softcap"):
        inner = _short_attention
    return attention_mask.attend(inner, module, query, key, value, **kwargs), None


def _short_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention by its formula; on short rows several times as fast on a CPU as the fused kernel.

    Heads that share keys (grouped queries) are further queries to the same keys.
    """
    rows, heads, span, size = query.shape
    if span > _SHORT:
        output: tuple[Tensor, None] = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)
        return output
    groups = key.shape[1]
    scaling = kwargs.get("scaling")
    query = (query * (size**-0.5 if scaling is None else scaling)).reshape(rows, groups, heads // groups * span, size)
    scores = (query @ key.transpose(2, 3)).view(rows, groups, heads // groups, span, -1)
    scores = scores.masked_fill(~mask[:, :, None], torch.finfo(scores.dtype).min)
    shares = (
        torch.softmax(scores, -1, dtype=torch.float32 if scores.itemsize < 4 else scores.dtype)
        .view(rows, groups, heads // groups * span, -1)
        .to(value.dtype)
    )
    return (shares @ value).view(rows, heads, span, -1).transpose(1, 2), None


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


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@torch.no_grad()
def check_passes(adapter: ModelAdapter) -> None:
    """Compare passes of ours with the model's own, for an architecture that somebody has described.

    Raises:
        UnknownArchitectureError: If they differ: the model does something that the description does not say.
    """
    words = int(adapter.model.config.get_text_config().vocab_size)
    rows = [[(7 * i + 3 * n + 1) % words for i in range(length)] for n, length in enumerate((9, 5))]
    try:
        line = TokenRows(adapter, rows, pad=0).line()
        logits = adapter.logits(adapter.finish(line.run(line.hidden, 0, adapter.n_layers)))
        error = 0.0
        for number, row in enumerate(rows):
            own = adapter.model(input_ids=torch.tensor([row], device=adapter.device)).logits[0].to(logits)
            ours = logits[[line.index(number, i) for i in range(len(row))]]
            error = max(error, float((ours - own).norm() / own.norm()))
    except (RuntimeError, TypeError, KeyError, AttributeError, IndexError, ValueError) as failure:
        raise UnknownArchitectureError(
            f"a model of family {adapter.spec.family!r} cannot be run layer by layer as described "
            f"({type(failure).__name__}: {str(failure).splitlines()[0]})"
        ) from failure
    if not error < (1e-3 if adapter.dtype in (torch.float32, torch.float64) else 0.1):
        raise UnknownArchitectureError(
            f"run layer by layer as described, a model of family {adapter.spec.family!r} says something else than on "
            f"its own (logits differ by {error:.0%}): it does something between its layers, or behind them, that "
            "model.language_model.arch cannot say. Editing it would go wrong"
        )


def allowed_positions(mask: Tensor | None, padding: Tensor) -> Tensor:
    """Turn a layer's mask into ``(batch, time, time)`` booleans, true where a query may look.

    Raises:
        ValueError: If the mask is not one that says so for each pair of positions.
    """
    batch, time = padding.shape
    if mask is None:  # a plain causal pass without padding
        causal = torch.ones(time, time, dtype=torch.bool, device=padding.device).tril()
        return causal & padding.bool()[:, None, :]
    if mask.dim() != 4:
        raise ValueError(
            f"attention masks of {mask.dim()} dimensions are not supported: load the model with "
            "attn_implementation='sdpa' or 'eager'"
        )
    allowed = mask if mask.dtype == torch.bool else mask >= 0
    return allowed[:, 0, :, :time].expand(batch, -1, -1)


def _by_id(calls: Mapping[int, Mapping[str, Any]], name: str) -> dict[int, Any]:
    """Return the distinct values of an argument over all layers, by identity."""
    return {id(call.get(name)): call.get(name) for call in calls.values()}


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the common beginning."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count
