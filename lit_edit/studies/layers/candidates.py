"""Which layers and groups of layers are tried. Numbers in, numbers out: no model, no files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lit_edit.errors import ArgumentError

Layers = tuple[int, ...]
"""A candidate: the layers that are edited together, ascending."""

ROUNDS = 3
"""Of single layers, at least: so the first is over a quarter of the edits."""


@dataclass(frozen=True)
class Round:
    """A round of the search over single layers."""

    step: int  # distance of the neighbours that are tried beside the best layers of the round before; 0: none are
    edits: int  # that each candidate makes


def automatic_stride(depth: int) -> int:
    """Return the distance of the first grid's layers: about eight of them over the depth.

    Example:
        >>> [automatic_stride(depth) for depth in (4, 12, 30, 48)]
        [1, 2, 4, 6]
    """
    return max(1, round(depth / 8))


def rounds_of(stride: int, edits: int) -> list[Round]:
    """Return the rounds over single layers: the grid gets finer by halves, and the edits twice as many.

    Example:
        >>> [(r.step, r.edits) for r in rounds_of(4, 12)]
        [(4, 3), (2, 6), (1, 12)]
        >>> [(r.step, r.edits) for r in rounds_of(1, 12)]
        [(1, 3), (0, 6), (0, 12)]
    """
    steps = [stride]
    while steps[-1] > 1:
        steps.append(steps[-1] // 2)
    steps += [0] * (ROUNDS - len(steps))
    fewest = min(2, edits)
    return [
        Round(step, max(fewest, math.ceil(edits / 2 ** (len(steps) - 1 - number)))) for number, step in enumerate(steps)
    ]


def coarse_layers(depth: int, stride: int) -> list[Layers]:
    """Return the first grid of single layers; a stride at which the model has no second one is refused.

    Example:
        >>> coarse_layers(10, 4)
        [(0,), (4,), (8,)]
    """
    most = max(1, depth - 1)
    if not 1 <= stride <= most:
        bounds = f"from 1 to {most}" if most > 1 else "1"
        raise ArgumentError(f"--stride must be {bounds} (layers of the model: {depth}), got {stride}")
    return [(layer,) for layer in range(0, depth, stride)]


def with_neighbours(best: Iterable[Layers], step: int, depth: int) -> list[Layers]:
    """Return single layers, and those ``step`` below and above that the model has, each once.

    Example:
        >>> with_neighbours([(4,), (0,)], 2, 6)
        [(4,), (2,), (0,)]
    """
    found = [(layer + shift,) for (layer,) in best for shift in (0, -step, step) if 0 <= layer + shift < depth]
    return list(dict.fromkeys(found))


def groups_around(best: Iterable[Layers], widths: Sequence[int], depth: int) -> list[Layers]:
    """Return groups of consecutive layers that end at, lie around, and begin at the best single layers.

    Groups of one are left out: they have been tried.

    Example:
        >>> groups_around([(3,)], [1, 3], depth=5)
        [(1, 2, 3), (2, 3, 4)]
    """
    found = [
        tuple(range(first, first + width))
        for (layer,) in best
        for width in sorted(set(widths) - {1})
        for first in (layer - width + 1, layer - width // 2, layer)
        if first >= 0 and first + width <= depth
    ]
    return list(dict.fromkeys(found))


WIDTHS = (1, 3, 5)
"""Of groups, where nobody says otherwise."""


def check_widths(widths: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    """Return the widths, ascending and each once; ``None``: those of :data:`WIDTHS` that the model has layers for."""
    if widths is None:
        return tuple(width for width in WIDTHS if width <= depth)
    if not widths or min(widths) < 1 or max(widths) > depth:
        raise ArgumentError(
            f"--widths must be from 1 to {depth}, the layers of the model, got {' '.join(map(str, widths)) or 'none'}"
        )
    return tuple(sorted(set(widths)))


def shown(layers: Sequence[int]) -> str:
    """Return layers for people.

    Example:
        >>> shown((6, 7, 8)), shown((4,)), shown((1, 3))
        ('6-8', '4', '1, 3')
    """
    if len(layers) > 1 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ", ".join(map(str, layers))
