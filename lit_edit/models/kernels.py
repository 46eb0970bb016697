"""The kernels that a view of a model multiplies with: the fastest exact ones, pinned ones, shorter types."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_edit.models.products import Products, bfloat16_pays, choose_kernel, use_kernel
from lit_edit.models.weights import Weights

if TYPE_CHECKING:
    from typing_extensions import Self


class Kernels(Weights):
    """What decides about round-off in the products of a view: a shorter type that they are made in, if one is.

    ``head_weight`` is the head's in that type.
    """

    products: Products = "auto"
    rounded_to: torch.dtype | None = None
    head_weight: Tensor | None = None
    _bfloat16: bool | None = None

    def rounded(self, dtype: torch.dtype, start: int) -> Self:
        """Return a view whose products are of a shorter type from layer ``start`` on: faster, and no longer exact.

        The matrices of those layers and of the head are rounded once; norms, sums and the residual stream stay as they
        are.
        """
        if self.sharded or self.spec.tail == "model":  # its matrices are nowhere whole, or its head is not ours to call
            return self
        prefixes = tuple(self.layer_prefix(layer) for layer in range(start, self.n_layers))
        matrices = {name: p for name, p in self.model.named_parameters() if name.startswith(prefixes) and p.dim() == 2}
        view = self.with_weights({name: self.weights.get(name, p).detach().to(dtype) for name, p in matrices.items()})
        view.rounded_to, view.head_weight = dtype, self.head.weight.detach().to(dtype)
        return view

    def bfloat16_pays(self) -> bool:
        """Tell whether this device multiplies in bfloat16 clearly faster than in float32."""
        if self.sharded:
            return False
        if self._bfloat16 is not None:
            return self._bfloat16
        if self.device.type == "cpu":
            return bfloat16_pays(torch.get_num_threads())
        return self.device.type == "cuda" and torch.cuda.is_bf16_supported()

    def kernels(self) -> dict[str, Any]:
        """Return what decides about round-off on this machine, as primitives for :meth:`pin_kernels`."""
        threads = torch.get_num_threads()
        exact = self.device.type != "cpu" or self.dtype != torch.float32
        kernel = self.products if self.products != "auto" or exact else choose_kernel(threads)
        return {"products": kernel, "bfloat16": self.bfloat16_pays(), "threads": threads, "device": self.device.type}

    def pin_kernels(self, kernels: Mapping[str, Any]) -> None:
        """Multiply as an earlier process did, whatever a measurement would say now."""
        self.products, self._bfloat16 = kernels["products"], kernels["bfloat16"]

    def fast_products(self) -> AbstractContextManager[None]:
        """Return a context in which matrices are multiplied as this view wants it.

        By default by the fastest kernel that is exact in float32; in a view that is :meth:`rounded`, in its type.
        """
        if self.rounded_to is not None:
            return torch.autocast(self.device.type, self.rounded_to)
        if self.device.type != "cpu" or self.dtype != torch.float32:
            return nullcontext()
        return use_kernel(choose_kernel(torch.get_num_threads()) if self.products == "auto" else self.products)
