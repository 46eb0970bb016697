"""Weights that several ranks hold a part of each: reading them whole, writing one's own part."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def whole(weight: Tensor) -> Tensor:
    """Return a weight as an ordinary tensor; all ranks must ask when it is in parts."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


@torch.no_grad()
def write_(weight: Tensor, value: Tensor) -> None:
    """Write a value into a weight in place; every rank writes the part that it holds.

    Args:
        weight: The parameter, whole or in parts.
        value: The whole new value.
    """
    if not isinstance(weight, DTensor):
        weight.copy_(value)
        return
    local, part = weight.to_local(), value
    for dimension, placement in enumerate(weight.placements):
        if isinstance(placement, Shard):
            ranks, rank = weight.device_mesh.size(dimension), weight.device_mesh.get_local_rank(dimension)
            part = own_part(part, placement.dim, ranks, rank)
    local.copy_(part)


def own_part(value: Tensor, dim: int, ranks: int, rank: int) -> Tensor:
    """Return what a rank holds of a tensor that is cut along a dimension: equal parts, the last ones shorter or empty.

    Example:
        >>> [own_part(torch.arange(5), 0, 3, rank).tolist() for rank in range(3)]
        [[0, 1], [2, 3], [4]]
    """
    size = -(-value.shape[dim] // ranks)
    start = min(rank * size, value.shape[dim])
    return value.narrow(dim, start, min(size, value.shape[dim] - start))
