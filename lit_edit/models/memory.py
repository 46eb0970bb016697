"""What a model computes with beside its weights: the memories that some editors keep.

A memory changes a view of the model, never the model. It has two ways to do so, and an editor uses one of them:

* a *patch* stands behind the down projection of a layer and sees every token by itself. A model with patches is still
  causal, so what rows have in common is computed once, and nothing depends on what else is in a batch;
* a *route* is chosen for a whole prompt: text that is put before it, or another model that answers in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

Model = TypeVar("Model")
"""What answers: a view of a model, which knows its memory, so that this file need not know it."""
Patch = Callable[[Tensor, Tensor], Tensor]
"""Inputs ``(..., d_in)`` and outputs ``(..., d_out)`` of a down projection to the outputs that take their place."""


@dataclass(frozen=True)
class Route(Generic[Model]):
    """How a prompt is answered: with ``context`` put before it, by ``adapter``, if another model than the edited one.

    That model must share the tokenizer; the context holds whatever is to stand between.
    """

    context: str = ""
    adapter: Model | None = None


class Memory:
    """A memory that changes nothing; editors override one of the two."""

    def patches(self) -> Mapping[int, Patch]:
        """Return what stands behind down projections, by layer."""
        return {}

    def routes(self, prompts: Sequence[str]) -> list[Route[Any]] | None:
        """Return how each prompt is answered; ``None`` where this memory does not route."""
        return None
