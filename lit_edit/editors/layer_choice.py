"""Which layers the user asks for, checked before there is a model and on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias, TypeVar

if TYPE_CHECKING:
    from lit_edit.models.adapter import ModelAdapter

T = TypeVar("T")

Published: TypeAlias = Mapping[tuple[str, int, int], T]
"""What papers choose, by model type, number of layers and hidden size."""


def chosen_layers(layers: Sequence[int] | None) -> tuple[int, ...] | None:
    """Return what was asked for, as a tuple.

    Raises:
        ValueError: If the numbers are not ascending, different and from 0 on, or there are none.

    Example:
        >>> chosen_layers([3, 4])
        (3, 4)
    """
    if layers is None:
        return None
    if len(layers) == 0 or list(layers) != sorted(set(layers)) or min(layers) < 0:
        raise ValueError(f"layers must be ascending, different and not negative, got {list(layers)}")
    return tuple(layers)


def existing_layers(adapter: ModelAdapter, layers: Sequence[int]) -> tuple[int, ...]:
    """Return layers that the model has and that have an MLP; a :class:`UserError` if one has not."""
    for layer in layers:
        adapter.down_proj(layer)
    return tuple(layers)


def published_for(adapter: ModelAdapter, published: Published[T], otherwise: T) -> T:
    """Return what is published for a model, or something else for one that no paper has used."""
    width = adapter.shape(adapter.editable[0])[0]
    return published.get((adapter.model.config.model_type, adapter.n_layers, width), otherwise)


def at_depth(adapter: ModelAdapter, share: float) -> int:
    """Return the layer at a share of a model's depth."""
    return int(share * adapter.n_layers)
