"""Which layers the user asks for, checked before there is a model and on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lit_edit.models.adapter import ModelAdapter


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
    """Return layers that the model has.

    Raises:
        ArgumentError: If it lacks one.
    """
    for layer in layers:
        adapter.check_layer(layer)
    return tuple(layers)
