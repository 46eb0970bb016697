"""Step rules of the target optimisation: from losses and gradients to the next vectors, each edit on its own."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class StepRule(Protocol):
    """Decides where to look next."""

    def step(self, delta: Tensor, gradient: Tensor, loss: Tensor) -> Tensor:
        """Return the next vectors ``(edits, d_model)``, from the gradient there and the losses ``(edits,)``."""


class Polyak:
    r"""Steps as long as a linear loss would need to reach zero, never longer than a share of the state.

    The least value of this loss is known: a target that is said has none. Polyak's step length (Introduction to
    Optimization, 1987, section 5.3) needs nothing else, no learning rate and no second evaluation:

    .. math:: \delta \leftarrow \delta - \min\Big(\frac{L}{g^\top p}, \frac{\rho |h_0|}{|p|}\Big) p,
              \qquad p = g / \sqrt[4]{v},

    with :math:`\rho` the ``trust``, :math:`|h_0|` the ``radius`` ``(edits,)``, and :math:`v` the running mean of
    :math:`g^2` (decay 0.9, corrected for its start), coordinate by coordinate: half way between the gradient and Adam's
    direction. Less than half of Adam's evaluations, and shorter vectors, at equal quality; what else was tried is in
    docs/performance.md.
    """

    def __init__(self, trust: float, radius: Tensor, like: Tensor) -> None:
        self.longest, self.count = trust * radius, 0
        self.square = torch.zeros_like(like)

    def step(self, delta: Tensor, gradient: Tensor, loss: Tensor) -> Tensor:
        """Return ``delta`` moved by one step."""
        self.count += 1
        self.square.mul_(0.9).addcmul_(gradient, gradient, value=0.1)
        direction = gradient / (self.square / (1 - 0.9**self.count)).pow(0.25).add_(1e-12)
        slope = (gradient * direction).sum(1)
        length = torch.minimum(loss / slope, self.longest / torch.linalg.vector_norm(direction, dim=1))
        # A gradient of zero leaves everything where it is.
        return delta - torch.where(slope > 0, length, torch.zeros_like(length))[:, None] * direction


class Adam:
    """Adam (betas 0.9 and 0.999, eps 1e-8), as published, on vectors like ``(edits, d_model)``."""

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
