"""Step rules of the target optimisation: from losses and gradients to the next vectors, each edit on its own."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class StepRule(Protocol):
    """Decides where to look next."""

    def step(self, delta: Tensor, gradient: Tensor, loss: Tensor) -> Tensor:
        """Return the next vectors ``(edits, d_model)``.

        Args:
            delta: ``(edits, d_model)``, where the loss was measured.
            gradient: ``(edits, d_model)``, of the loss there.
            loss: ``(edits,)``.
        """
        ...


class Adam:
    """Adam (betas 0.9 and 0.999, eps 1e-8), as published.

    Args:
        lr: Learning rate.
        like: ``(edits, d_model)``, gives shape and type.
    """

    def __init__(self, lr: float, like: Tensor) -> None:
        self.lr, self.count = lr, 0
        self.mean, self.square = torch.zeros_like(like), torch.zeros_like(like)

    def step(self, delta: Tensor, gradient: Tensor, loss: Tensor) -> Tensor:
        """Return ``delta`` moved by one step of Adam."""
        self.count += 1
        self.mean.lerp_(gradient, 0.1)
        self.square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        denominator = (self.square.sqrt() / (1 - 0.999**self.count) ** 0.5).add_(1e-8)
        return delta.addcdiv(self.mean, denominator, value=-self.lr / (1 - 0.9**self.count))
