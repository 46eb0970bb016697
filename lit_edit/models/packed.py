"""Rows of tokens run as one line: nothing is padded, and what rows have in common is computed once.

In a causal model the state of a token depends on the tokens before it and on nothing else. Rows that begin alike
therefore share states (they form a tree), and a pass may start in the middle of its rows when the attention keys and
values of what comes before are kept. Linear layers, where the time goes, see one long line of tokens; only attention
looks at rows, padded to blocks of similar length. The results equal those of an ordinary padded pass up to round-off.

A model whose attention cannot be reached (:mod:`~lit_edit.models.packed_attention`; GPT-J) runs its layers on the
padded blocks instead: the same interface here, without the gain.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.packed_attention import AttentionCall, KeyValues, RowBlock, RowCache, packed_attention
from lit_edit.models.passes import CACHE_NAMES
from lit_edit.text.buckets import partition_by_length
from lit_edit.text.tokens import pad_right

_BLOCK_OVERHEAD = 256  # what one more block costs in attention, in padded tokens


class TokenRows:
    """The distinct tokens of some rows, none empty, with all that the model's layers want to know about them.

    ``share`` says up to which position a row may share tokens with others; everywhere by default.

    Attributes:
        paths: Per row, the node (distinct token) at each position.
        hidden: ``(nodes, d_model)``, the input of the first layer.
    """

    def __init__(
        self, adapter: ModelAdapter, rows: Sequence[Sequence[int]], pad: int, share: Sequence[int] | None = None
    ) -> None:
        self.adapter = adapter
        ids, mask = pad_right(rows, pad, adapter.device)
        self._ids, self._mask = ids, mask
        hidden, self.calls = adapter.record_calls(ids, mask)
        self._calls_of: dict[tuple[int, ...], dict[int, dict[str, Any]]] = {tuple(range(len(rows))): self.calls}
        self.length = ids.shape[1]
        masks = {id(call.get("attention_mask")): call.get("attention_mask") for call in self.calls.values()}
        self.allowed = {} if adapter.whole else {kind: allowed_positions(own, mask) for kind, own in masks.items()}
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
        """Lay rows (all by default) out as a line, from ``starts`` to just before ``stops``.

        What comes before the starts must be in the line ``behind``.
        """
        rows = range(len(self.paths)) if rows is None else rows
        if self.adapter.whole:  # each row from its beginning on
            starts = behind = None
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

    def calls_of(self, rows: Sequence[int]) -> Mapping[int, Mapping[str, Any]]:
        """Return how the model would call its layers for some of the rows, as it alone knows what is by row."""
        key = tuple(rows)
        if key not in self._calls_of:
            _, self._calls_of[key] = self.adapter.record_calls(self._ids[list(key)], self._mask[list(key)])
        return self._calls_of[key]

    def places(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the row and the position at which each node stands for the first time."""
        return self._row[nodes], self._position[nodes]


class Line:
    """Tokens of some rows, one behind the other: the nodes ``(tokens,)``. Made by :meth:`TokenRows.line`."""

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
        """Run layers ``start .. stop - 1`` on ``hidden`` ``(tokens, d_model)``, with the rows' view or another.

        ``kept`` are the attention keys and values of the line behind; ``keep`` receives those of this line, ``keys``
        the inputs of the down projections ``(tokens, d_in)``.
        """
        if not len(self):
            return hidden
        adapter = adapter or self.adapter
        run = self._run_packed if adapter.packs else self._run_whole if adapter.whole else self._run_padded
        with packed_attention(adapter) if adapter.packs else nullcontext():
            for layer in range(start, stop):
                kind = id(self.source.calls[layer].get("attention_mask"))
                call = AttentionCall(self._blocks, kind, self.adapter.attention, layer, (kept or {}).get(layer), keep)
                with adapter.record_keys([layer] if layer in adapter.editable else []) as found:
                    hidden, down_inputs = run(adapter, layer, hidden, call, found)
                if keys is not None:
                    keys[layer] = down_inputs
        return hidden

    def _run_packed(
        self, adapter: ModelAdapter, layer: int, hidden: Tensor, call: AttentionCall, found: Mapping[int, Tensor]
    ) -> tuple[Tensor, Tensor]:
        key = tuple(id(value) for value in self.source.calls[layer].values())
        if key not in self._arguments:
            row, position = self.source.places(self.nodes)
            self._arguments[key] = self.source.arguments(layer, row[None], position[None])
        arguments = self._arguments[key] | {"attention_mask": call}
        return adapter.run_layer(layer, hidden[None], arguments).squeeze(0), found[layer].reshape(
            len(self), -1
        ) if layer in found else hidden[:, :0]

    def _run_whole(
        self, adapter: ModelAdapter, layer: int, hidden: Tensor, call: AttentionCall, found: Mapping[int, Tensor]
    ) -> tuple[Tensor, Tensor]:
        row, position = self.source.places(self.nodes)
        rows, slot = row.unique(return_inverse=True)
        padded = hidden.new_zeros(len(rows), self.source.length, hidden.shape[-1]).index_put((slot, position), hidden)
        arguments = self.source.calls_of(rows.tolist())[layer]
        out = adapter.run_layer(layer, padded, arguments)[slot, position]
        keys = found[layer].reshape(len(rows), self.source.length, -1)[slot, position] if layer in found else out[:, :0]
        return out, keys

    def _run_padded(
        self, adapter: ModelAdapter, layer: int, hidden: Tensor, call: AttentionCall, found: Mapping[int, Tensor]
    ) -> tuple[Tensor, Tensor]:
        outputs, down_inputs, first = [], [], 0
        for number, block in enumerate(self._blocks):
            part = hidden[first : first + block.tokens]
            row, position = self.source.places(self.nodes[first : first + block.tokens])
            if (number, layer) not in self._padded:
                slots = block.slots.view(block.rows, block.span)
                self._padded[number, layer] = self.source.arguments(layer, row[slots], position[slots])
            cache = RowCache(call, block)
            arguments = self._padded[number, layer] | {"attention_mask": block.masks[call.kind]}
            arguments |= {name: cache for name in CACHE_NAMES if name in arguments}
            outputs.append(block.unpad(adapter.run_layer(layer, block.pad(part), arguments)))
            down_inputs.append(
                block.unpad(found[layer].reshape(block.rows, block.span, -1)) if layer in found else part[:, :0]
            )
            first += block.tokens
        call.store_padded()
        return torch.cat(outputs), torch.cat(down_inputs)

    def _block(self, own: Sequence[tuple[int, int, int]]) -> RowBlock:
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
        return RowBlock(len(own), span, count, index[0], index[1], index[2], shares, masks)


def allowed_positions(mask: Tensor | None, padding: Tensor) -> Tensor:
    """Turn a layer's mask into ``(batch, time, time)`` booleans, true where a query may look; refuse other masks."""
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


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the common beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))
