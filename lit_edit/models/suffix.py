"""The part of a batch from one position on, with everything before it cached.

In a causal model nothing before a position depends on it. When only the state at the lookup token changes (as in the
target optimisation), the rows need to be run from that token on; attention reads the cached keys and values of the
prefix. The result equals a full pass up to round-off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_edit.models.adapter import _CACHE_NAMES, ModelAdapter, Trace, take_rows


class _PrefixCache:
    """Stands in for a transformers cache: returns prefix and new keys joined, and stores nothing."""

    def __init__(self, keys: Mapping[int, Tensor], values: Mapping[int, Tensor]) -> None:
        self._keys, self._values = keys, values

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self._keys[layer_idx], keys], 2), torch.cat([self._values[layer_idx], values], 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return next(iter(self._keys.values())).shape[2]


@dataclass
class SuffixBatch:
    """Rows of a trace from a position of each row on.

    Attributes:
        hidden: ``(batch, suffix, d_model)``, the state of the unchanged model entering the first layer to run; column
            0 is the lookup token. Short rows are padded on the right with copies of their last token.
        calls: Per layer, the arguments to call it with.
    """

    hidden: Tensor
    calls: dict[int, dict[str, Any]]
    keys: dict[int, Tensor]
    values: dict[int, Tensor]

    @classmethod
    def from_trace(
        cls, adapter: ModelAdapter, trace: Trace, starts: Sequence[int], lengths: Sequence[int]
    ) -> SuffixBatch:
        """Cut a right-padded trace.

        Args:
            adapter: The adapter that made the trace.
            trace: A trace with its cache kept.
            starts: The first position to run again, per row.
            lengths: The number of tokens of each row.

        Raises:
            ValueError: If the trace has no cache.
        """
        if trace.cache is None:
            raise ValueError("SuffixBatch needs a trace made with keep_cache=True")
        device = trace.hidden.device
        start = torch.tensor(starts, device=device)[:, None]
        last = torch.tensor(lengths, device=device)[:, None] - 1
        span = int((last - start).max()) + 1
        offsets = torch.arange(span, device=device)[None]
        position = torch.minimum(start + offsets, last)  # (batch, suffix), position in the row
        prefix = int(start.max())
        columns = torch.cat([torch.arange(prefix, device=device).expand(len(starts), -1), position], 1)
        # Prefix columns at or beyond the start are seen as suffix; a padding column is seen by itself only, so that no
        # row of the softmax is empty.
        real = torch.cat([columns[:, :prefix] < start, start + offsets <= last], 1)[:, None, :]
        itself = torch.zeros(1, span, prefix + span, dtype=torch.bool, device=device)
        itself[0, :, prefix:] = torch.eye(span, dtype=torch.bool, device=device)

        calls: dict[int, dict[str, Any]] = {}
        masks: dict[int, Tensor] = {}
        for index, call in trace.calls.items():
            source = call.get("attention_mask")
            if id(source) not in masks:
                allowed = _allowed(source, trace.attention_mask)
                rows = allowed.gather(1, position[:, :, None].expand(-1, -1, allowed.shape[2]))
                seen = rows.gather(2, columns[:, None, :].expand(-1, span, -1))
                masks[id(source)] = _mask_like((seen & real | itself)[:, None], source, adapter)
            calls[index] = {
                name: masks[id(source)] if name == "attention_mask" else _at_positions(name, value, position)
                for name, value in call.items()
            }
        layers = list(trace.calls)
        cached: Any = trace.cache.layers
        return cls(
            hidden=_gather_time(trace.hidden, position),
            calls=calls,
            keys={i: cached[i].keys[:, :, :prefix] for i in layers},
            values={i: cached[i].values[:, :, :prefix] for i in layers},
        )

    def select(self, rows: Tensor) -> SuffixBatch:
        """Return the batch of some of the rows (indices)."""
        return SuffixBatch(
            hidden=self.hidden.index_select(0, rows),
            calls=take_rows(self.calls, rows, self.hidden.shape[0]),
            keys={i: k.index_select(0, rows) for i, k in self.keys.items()},
            values={i: v.index_select(0, rows) for i, v in self.values.items()},
        )

    def run(self, adapter: ModelAdapter, hidden: Tensor, start: int, stop: int) -> Tensor:
        """Run layers ``start .. stop - 1`` on suffix states ``(batch, suffix, d_model)``."""
        cache = _PrefixCache(self.keys, self.values)
        calls = {
            index: {name: cache if name in _CACHE_NAMES else value for name, value in self.calls[index].items()}
            for index in range(start, stop)
        }
        return adapter.run_layers(hidden, calls, start, stop)


def _gather_time(values: Tensor, position: Tensor) -> Tensor:
    """Pick ``values[b, position[b, s]]`` from ``(batch or 1, time, d)``."""
    values = values.expand(position.shape[0], -1, -1)
    return values.gather(1, position[:, :, None].expand(-1, -1, values.shape[2]))


def _at_positions(name: str, value: Any, position: Tensor) -> Any:
    if name == "position_ids" and isinstance(value, Tensor):
        return value.expand(position.shape[0], -1).gather(1, position)
    if name == "position_embeddings" and value is not None:
        return tuple(_gather_time(table, position) for table in value)
    if name == "cache_position":
        return None
    return value


def _allowed(mask: Tensor | None, padding: Tensor) -> Tensor:
    """Turn a layer's mask into ``(batch, time, time)`` booleans, true where a query may look."""
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


def _mask_like(allowed: Tensor, source: Tensor | None, adapter: ModelAdapter) -> Tensor:
    """Booleans for sdpa, additive floats for eager attention, as the model itself would have made them."""
    eager = adapter.model.config._attn_implementation == "eager"
    if (source is None and not eager) or (source is not None and source.dtype == torch.bool):
        return allowed
    dtype = adapter.dtype if source is None else source.dtype
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
