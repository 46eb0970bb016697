"""Weights that several ranks hold a part of each: reading them whole, writing one's own part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional


def is_sharded(weight: Tensor) -> bool:
    """Tell whether this process holds a part of a weight only."""
    return isinstance(weight, DTensor)


def whole(weight: Tensor) -> Tensor:
    """Return a weight as an ordinary tensor; all ranks must ask when it is in parts."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


@torch.no_grad()
def gather_weights(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Return a model's weights whole and in host memory, where they are to be kept; every rank must ask."""
    found = {}
    for name, parameter in model.named_parameters():
        value = whole(parameter.detach())
        if keep:
            found[name] = value.cpu()
    return found


@torch.no_grad()
def write_(weight: Tensor, value: Tensor) -> None:
    """Write a whole new value into a weight in place; of one in parts every rank writes the part that it holds."""
    if isinstance(weight, DTensor):
        weight.to_local().copy_(part_of(weight, value))
    else:
        weight.copy_(value)


def part_of(weight: DTensor, value: Tensor) -> Tensor:
    """Return the part of a whole value that this process holds of a weight."""
    for dimension, placement in enumerate(weight.placements):
        if isinstance(placement, Shard):
            ranks, rank = weight.device_mesh.size(dimension), weight.device_mesh.get_local_rank(dimension)
            value = own_part(value, placement.dim, ranks, rank)
    return value


def own_part(value: Tensor, dim: int, ranks: int, rank: int) -> Tensor:
    """Return what a rank holds of a tensor that is cut along a dimension: equal parts, the last ones shorter or empty.

    Example:
        >>> [own_part(torch.arange(5), 0, 3, rank).tolist() for rank in range(3)]
        [[0, 1], [2, 3], [4]]
    """
    size = -(-value.shape[dim] // ranks)
    start = min(rank * size, value.shape[dim])
    return value.narrow(dim, start, min(size, value.shape[dim] - start))


def written_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module was written as; FSDP puts one of its own in front."""
    kinds: Any = type(module).__mro__
    kind: type[nn.Module] = next(kind for kind in kinds if not issubclass(kind, FSDPModule))
    return kind


@contextmanager
def lend(module: nn.Module, weight: Tensor) -> Iterator[None]:
    """Let a ``Linear`` or ``Conv1D`` compute with another weight, which is whole and in the module's layout.

    ``functional_call`` cannot do that where hooks of FSDP put the module's own weight in place before each call.
    """

    def forward(inputs: Tensor) -> Tensor:
        layout = weight if isinstance(module, nn.Linear) else weight.T  # Conv1D keeps it the other way round
        bias: Any = module.bias  # by now gathered
        return functional.linear(inputs, layout, bias)

    module.forward = forward  # shadows the method of the class
    try:
        yield
    finally:
        del module.forward


class _StandIn(nn.Module):
    """Takes a layer's place: computes something else and looks the same to the model."""

    def __init__(self, layer: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self._layer = [layer]  # in a list: it is not to be a part of this module
        self._forward = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._layer[0], name)


@contextmanager
def stand_ins(layers: nn.ModuleList, forward: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Replace all layers of a model; what hangs on them, as FSDP's hooks do, is passed over."""
    own = list(layers)
    for index, layer in enumerate(own):
        layers[index] = _StandIn(layer, forward(index))
    try:
        yield
    finally:
        for index, layer in enumerate(own):
            layers[index] = layer
