"""The weights of a model as a view of it computes with them, whatever layout they are stored in.

``torch.nn.Linear`` stores ``(d_out, d_in)``, transformers' ``Conv1D`` stores ``(d_in, d_out)``; editors only see the
former. A view borrows parameters, and has a memory beside them, for the time of its passes: the model stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from lit_edit.devices.algebra import for_algebra
from lit_edit.models.memory import Memory, Patch, Route
from lit_edit.models.shards import lend, whole
from lit_edit.models.structure import Structure

if TYPE_CHECKING:
    from typing_extensions import Self


class Weights(Structure):
    """The edited weights of a model, those that a view of it borrows, by full name, and the memory beside them."""

    weights: dict[str, Tensor]
    memory: Memory | None = None

    def weight(self, layer: int) -> Tensor:
        """Return the edited weight of a layer in this view, in the layout the model stores it in."""
        lent = self.weights.get(self.weight_name(layer))
        return whole(self.own_weight(layer)) if lent is None else lent

    def shape(self, layer: int) -> tuple[int, int]:
        """Return ``(d_out, d_in)`` of a layer's down projection, whatever its layout."""
        rows, columns = self.own_weight(layer).shape
        return (columns, rows) if isinstance(self.down_proj(layer), Conv1D) else (rows, columns)

    def to_layout(self, layer: int, delta: Tensor) -> Tensor:
        """Turn a ``(d_out, d_in)`` matrix into the layout of the layer's weight, which its module's type decides."""
        return delta.T if isinstance(self.down_proj(layer), Conv1D) else delta

    def project(self, layer: int, keys: Tensor) -> Tensor:
        """Return what a layer's down projection makes of its inputs ``(n, d_in)``, in this view: ``(n, d_out)``."""
        bias = self.down_proj(layer).bias
        values = torch.nn.functional.linear(keys, self.to_layout(layer, self.weight(layer)))
        return values + whole(bias) if isinstance(bias, Tensor) else values

    def mlp_output(self, layer: int, keys: Tensor) -> Tensor:
        """Return what a layer's MLP adds to the stream, from the inputs of its down projection ``(n, d_in)``."""
        return self.added(layer, self.project(layer, keys))

    def added(self, layer: int, values: Tensor) -> Tensor:
        """Return what is added to the residual stream where a down projection says ``values`` ``(n, d_out)``."""
        return self._normalised(layer)(values) * self.output_scale

    def _normalised(self, layer: int) -> Callable[[Tensor], Tensor]:
        """Return what becomes of a down projection's output before it is added to the residual stream."""
        module = self.output_norm(layer)
        if module is None:
            return lambda states: states
        own = {name: whole(parameter) for name, parameter in module.named_parameters()}
        return lambda states: functional_call(module, own, (states,))

    def to_weight_residual(self, layer: int, keys: Tensor, residuals: Tensor) -> Tensor:
        r"""Turn what the residual stream lacks, ``(d_out, n)`` float64, into what the down projection's output lacks.

        The same thing for most families. Gemma normalises that output, :math:`N(x) = s \odot x / \mathrm{rms}(x)`,
        before it is added: only the direction passes. The output is to point, at its old length, where :math:`N` comes
        nearest to :math:`N(x) + r` (:func:`nearest_direction`). Granite multiplies what is added by a number, which the
        residual is divided by. ``keys`` ``(n, d_in)`` are the inputs of the projection.
        """
        residuals = residuals / self.output_scale
        if self.spec.output_norm is None:
            return residuals
        norm = self._normalised(layer)
        weight = self.to_layout(layer, self.weight(layer))  # (d_out, d_in)
        output = keys.to(weight) @ weight.T  # (n, d_out)
        scale = for_algebra(norm(torch.ones_like(output[0])))  # the norm of ones is its scale
        wanted, output = for_algebra(norm(output)) + residuals.T, for_algebra(output)
        length = output.square().mean(1, keepdim=True).sqrt()
        return (nearest_direction(scale, wanted) * length - output).T.to(residuals)

    def with_weights(self, weights: Mapping[str, Tensor]) -> Self:
        """Return a view of the same model that computes with other parameters; the model itself is not touched."""
        view = copy.copy(self)
        view.weights = {**self.weights, **weights}
        return view

    def with_memory(self, memory: Memory | None) -> Self:
        """Return a view of the same model that computes with a memory, or without the one it has."""
        view = copy.copy(self)
        view.memory = memory
        return view

    def routes(self, prompts: Sequence[str]) -> list[Route[Self]]:
        """Return how this view answers each prompt."""
        found = None if self.memory is None else self.memory.routes(prompts)
        return [Route() for _ in prompts] if found is None else found

    @contextmanager
    def patched(self, layer: int | None = None) -> Iterator[None]:
        """Let the model itself compute with this view's memory, in one layer or in all.

        All passes of the view do so anyway. For your own calls of the model: ``with adapter.patched(): model(...)``.
        """
        with ExitStack() as stack:
            for index, patch in ({} if self.memory is None else self.memory.patches()).items():
                if layer is None or layer == index:
                    stack.callback(self.down_proj(index).register_forward_hook(_patching(patch)).remove)
            yield

    @contextmanager
    def lent(self, layer: int | None = None) -> Iterator[None]:
        """Let the down projections of a model in parts (of one layer, or all) compute with this view's weights."""
        with ExitStack() as stack:
            for index in self.editable if layer is None else {layer} & set(self.editable):
                if (weight := self.weights.get(self.weight_name(index))) is not None:
                    stack.enter_context(lend(self.down_proj(index), weight))
            yield


def nearest_direction(scale: Tensor, wanted: Tensor) -> Tensor:
    r"""Return the vectors of mean square 1 that a norm's scale takes nearest to what is wanted.

    :math:`\min_u |s \odot u - t|^2` under :math:`|u|^2 = d` has :math:`u_i = s_i t_i / (s_i^2 + \mu)`, with the one
    :math:`\mu > -\min s^2` at which the length is right: it falls as :math:`\mu` grows. To divide by the scale,
    :math:`u \propto t / s`, is right only where :math:`t` can be reached: else the coordinates that the scale makes
    small, and nobody hears, take all of the length. Scales of real models reach from 0.01 to 700.

    Args:
        scale: ``(d,)``.
        wanted: ``(n, d)``, float64.

    Returns:
        ``(n, d)``.
    """
    squares, product, size = scale.square(), scale * wanted, scale.numel()
    floor = squares.min()
    # Of mu + min s^2: the length is at most |s t| over it, and so no longer than it should be at the upper end.
    upper = torch.linalg.vector_norm(product, dim=1, keepdim=True) / size**0.5
    low, high = torch.zeros_like(upper), upper
    for _ in range(100):
        middle = (low + high) / 2
        long = (product / (squares - floor + middle)).square().mean(1, keepdim=True) > 1
        low, high = torch.where(long, middle, low), torch.where(long, high, middle)
    found = product / (squares - floor + high)
    return found / found.square().mean(1, keepdim=True).sqrt().clamp_min(torch.finfo(found.dtype).tiny)


def _patching(patch: Patch) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """Return a patch as a hook of the module behind which it stands."""
    return lambda module, args, output: patch(args[0], output)
