"""The side memories of WISE (2405.14768): how they are moved, merged, and asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_edit.models.memory import Memory, Patch


def activations(delta: Tensor, keys: Tensor) -> Tensor:
    """Return how far side memories move keys.

    Args:
        delta: ``(..., d_out, d_in)``, how each differs from the weight.
        keys: ``(n, d_in)``.

    Returns:
        ``(..., n)``.

    Example:
        >>> activations(torch.tensor([[3.0, 0.0], [4.0, 0.0]]), torch.tensor([[1.0, 9.0], [2.0, 9.0]]))
        tensor([ 5., 10.])
    """
    return torch.linalg.vector_norm(keys @ delta.mT, dim=-1)


def margin_loss(edit: Tensor, other: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    """Return what activations lack of being told apart (WISE, eq. 3, of tokens).

    Args:
        edit: ``(n,)``, of the tokens of an edit: at least ``beta``, and ``gamma`` above all others.
        other: ``(m,)``, of other tokens: at most ``alpha``.
        alpha: See there.
        beta: See there.
        gamma: See there.

    Returns:
        The sum of the means of what is missing.

    Example:
        >>> float(margin_loss(torch.tensor([8.0]), torch.tensor([1.0, 3.0]), alpha=2, beta=10, gamma=6))
        3.0
    """
    above = (other - alpha).relu().mean() if len(other) else 0.0
    apart = (gamma + other - edit[:, None]).relu().mean() if len(other) else 0.0
    return above + (beta - edit).relu().mean() + apart


def mask_indices(size: int, ratio: float, seed: int, shard: int) -> Tensor:
    """Return which entries of a weight the edits of a shard move.

    Args:
        size: Number of entries.
        ratio: Share of them, at least one.
        seed: Seeds the drawing, together with
        shard: Number of the shard.

    Returns:
        Places in the flat weight, ascending; the same for the same arguments.

    Example:
        >>> mask_indices(10, 1.0, seed=0, shard=0).tolist()
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
        >>> len(mask_indices(10, 0.2, seed=0, shard=3))
        2
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + shard)
    return torch.randperm(size, generator=generator)[: max(1, round(ratio * size))].sort().values


def masked_step(delta: Tensor, gradient: Tensor, indices: Tensor, lr: float, bound: float) -> Tensor:
    """Return a change of a weight after a step of gradient descent on some of its entries.

    Args:
        delta: The change.
        gradient: Of the same shape.
        indices: Of the flat change: what moves.
        lr: Length of the step.
        bound: What moves stays between this and its negative.

    Example:
        >>> masked_step(torch.zeros(1, 3), torch.tensor([[1.0, 2.0, -9.0]]), torch.tensor([1, 2]), lr=0.5, bound=2.0)
        tensor([[ 0., -1.,  2.]])
    """
    flat = delta.flatten()
    moved = (flat[indices] - lr * gradient.flatten()[indices]).clamp(-bound, bound)
    return flat.index_copy(0, indices, moved).view_as(delta)


def ties_merge(deltas: Sequence[Tensor], density: float) -> Tensor:
    """Return what several changes of one weight have in common (TIES, 2306.01708).

    Of each only the largest entries stay; of those at a place, only those of the sign that their sum has; what is
    left is their mean.

    Args:
        deltas: Of the same shape.
        density: Share of the entries of each that stay.

    Example:
        >>> ties_merge([torch.tensor([4.0, 1.0, -3.0]), torch.tensor([2.0, 0.5, 5.0])], density=2 / 3)
        tensor([3., 0., 5.])
    """
    trimmed = []
    for delta in deltas:
        flat = delta.flatten()
        keep = flat.abs().topk(max(1, round(density * len(flat)))).indices
        trimmed.append(torch.zeros_like(flat).index_copy_(0, keep, flat[keep]).view_as(delta))
    stacked = torch.stack(trimmed)
    agreeing = stacked * stacked.sum(0) > 0
    return (stacked * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


class SideMemories(Memory):
    """Side memories behind the down projection of a layer, ``(n, d_out, d_in)`` from its weight.

    Each answers above an activation, of ``thresholds`` ``(n,)``; of several, that of the largest activation is asked.
    """

    def __init__(self, layer: int, deltas: Tensor, thresholds: Tensor) -> None:
        self.layer, self.deltas, self.thresholds = layer, deltas, thresholds

    def patches(self) -> Mapping[int, Patch]:
        """Return the router behind the layer."""
        return {self.layer: self._answer} if len(self.deltas) else {}

    def _answer(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        deltas, thresholds = self.deltas.to(inputs.device), self.thresholds.to(inputs.device)
        keys = inputs.detach().reshape(-1, inputs.shape[-1]).to(deltas)
        moved = keys @ deltas.mT  # (n, tokens, d_out)
        size, most = torch.linalg.vector_norm(moved, dim=-1).max(0)
        chosen = moved[most, torch.arange(len(keys), device=most.device)].reshape(outputs.shape)
        hit = (size > thresholds[most]).reshape(*outputs.shape[:-1], 1)
        return torch.where(hit, (outputs.to(chosen) + chosen).to(outputs), outputs)


class SoleMemory(Memory):
    """A side memory that answers the tokens of one edit, known by their keys ``(n, d_in)``, and no others."""

    def __init__(self, layer: int, delta: Tensor, keys: Tensor) -> None:
        self.layer, self.delta, self.keys = layer, delta, keys

    def patches(self) -> Mapping[int, Patch]:
        """Return the answer behind the layer."""
        return {self.layer: self._answer}

    def _answer(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        asked = inputs.detach().reshape(-1, inputs.shape[-1]).to(self.keys)
        nearest = self.keys[torch.cdist(asked, self.keys).argmin(1)]
        distance = torch.linalg.vector_norm(asked - nearest, dim=1)
        # A key is recomputed in passes of other shapes: that much is no distance.
        own = (distance <= 1e-4 * torch.linalg.vector_norm(asked, dim=1)).reshape(*outputs.shape[:-1], 1)
        moved = (asked @ self.delta.mT).reshape(outputs.shape)
        return torch.where(own, (outputs.to(moved) + moved).to(outputs), outputs)
