"""What can be done to an update before it is written, whichever method has made it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

from torch import Tensor


class UpdateTransform(ABC):
    """A function of a layer's whole update and its original weight.

    It is applied to the update relative to the original weights, each time anew: editors keep what they have solved,
    and what is written is made of that. So it composes with undo and resume, and applying it at every edit is the same
    as applying it once at the end.
    """

    @abstractmethod
    def __call__(self, delta: Tensor, base: Tensor) -> Tensor:
        """Return what is to be written in place of an update.

        Args:
            delta: ``(d_out, d_in)``, the whole update; not to be changed.
            base: ``(d_out, d_in)``, the original weight, in the update's type.

        Returns:
            ``(d_out, d_in)``.
        """

    def settings(self) -> dict[str, Any]:
        """Return, as primitives, what the result depends on."""
        own = asdict(self) if is_dataclass(self) and not isinstance(self, type) else dict(vars(self))
        return {"transform": type(self).__name__, **own}


def transformed(delta: Tensor, base: Tensor, transforms: Sequence[UpdateTransform]) -> Tensor:
    """Apply transforms one after another."""
    for transform in transforms:
        delta = transform(delta, base)
    return delta
