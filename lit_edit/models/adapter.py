"""A model as editors see it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from lit_edit.devices.ranks import Ranks
from lit_edit.models.passes import Passes
from lit_edit.models.products import Products
from lit_edit.models.spec import ArchSpec


class ModelAdapter(Passes):
    """A causal language model as editors see it.

    What it has comes floor by floor: where the parts are (:class:`~lit_edit.models.structure.Structure`), weights and
    their layouts (:class:`~lit_edit.models.weights.Weights`), kernels
    (:class:`~lit_edit.models.kernels.Kernels`), and forward passes (:class:`~lit_edit.models.passes.Passes`).

    The adapter reads and never writes. To look at the model with other weights (the original ones, or an update that
    is not committed yet) make a view of it with :meth:`with_weights`. Whoever starts several processes that share the
    work on the model says so in ``ranks``.

    Args:
        model: A decoder-only Hugging Face model in evaluation mode.
        spec: Its family's description; found by ``config.model_type`` when not given.
        weights: Parameters to use in place of the model's own, by full name.
        products: Which kernel multiplies float32 matrices on a CPU (:mod:`lit_edit.models.products`).

    Raises:
        UnknownArchitectureError: If the family is unknown or ``spec`` names modules that the model does not have.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spec: ArchSpec | None = None,
        weights: Mapping[str, Tensor] | None = None,
        products: Products = "auto",
    ) -> None:
        super().__init__(model, spec)
        self.weights = dict(weights or {})
        self.products, self.ranks = products, Ranks()
        self._returned: list[object] = []
        self._signatures = [inspect.signature(layer.forward) for layer in self.layers]

    def by_route(self, prompts: Sequence[str]) -> list[tuple[ModelAdapter, dict[str, str]]]:
        """Return the models that answer some prompts, each with its prompts and what is put before each of them."""
        models: dict[int, tuple[ModelAdapter, dict[str, str]]] = {}
        for prompt, route in zip(prompts, self.routes(prompts), strict=True):
            model = route.adapter or self
            models.setdefault(id(model), (model, {}))[1][prompt] = route.context
        return list(models.values())
