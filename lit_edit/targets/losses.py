"""What the vectors under way cost, edit by edit, and which way down is (ROME 2202.05262 eq. 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_edit.devices.host_memory import LARGE, release_free_memory
from lit_edit.models.adapter import ModelAdapter
from lit_edit.targets.window import Chunk, Window

_HEAD_ROWS = 128
"""States that the head sees at a time, at most: its logits are by far the largest tensors of a step."""


@dataclass
class Losses:
    """Sums over the prompts of each edit, at one point.

    Attributes:
        nll: ``(edits,)``, the mean over contexts of the target's length-normalised negative log-likelihood.
        kl: ``(edits,)``, the weighted divergence on "<subject> is a" from the unchanged model.
        probability: ``(edits,)``, the mean over contexts of the target's length-normalised probability.
        margin: ``(edits,)``, over target tokens and contexts the least lead of the target's log-probability over that
            of the best other token; negative where the target is not the first choice.
        gradient: ``(edits, d_model)``, of ``nll + kl``.
    """

    nll: Tensor
    kl: Tensor
    probability: Tensor
    margin: Tensor
    gradient: Tensor

    @classmethod
    def none(cls, delta: Tensor) -> Losses:
        """Return the sums over no prompt, for vectors ``(edits, d_model)``."""
        zeros = torch.zeros(len(delta), dtype=delta.dtype, device=delta.device)
        return cls(zeros, zeros.clone(), zeros.clone(), torch.full_like(zeros, math.inf), torch.zeros_like(delta))


@dataclass
class TargetLoss:
    """The loss of the target optimisation as a function of the vectors.

    ``reference`` holds the log-probabilities of the unchanged model at the KL terms, by edit. It is filled at the first
    call, which must therefore be made with vectors of zero.
    """

    window: Window
    kl_factor: float
    reference: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, chunks: Sequence[Chunk], delta: Tensor, contexts: Tensor, with_gradient: bool = True) -> Losses:
        """Evaluate the loss of the edits in some chunks at vectors ``(edits, d_model)``, those of the whole window.

        ``contexts`` ``(edits,)`` says how many prompts each edit is seen at. A gradient not wanted is zero.
        """
        losses, aside = Losses.none(delta), Losses.none(delta)
        first = not self.reference
        with self.window.adapter.fast_products():
            for chunk in chunks:
                self._add(chunk, delta, contexts, with_gradient, losses if chunk.counts else aside)
        self._share(losses, chunks, first)
        if self.window.adapter.sharded:  # layers come and go, and leave pieces of memory behind
            release_free_memory()
        losses.nll /= contexts
        losses.probability /= contexts
        return losses

    def _share(self, losses: Losses, chunks: Sequence[Chunk], first: bool) -> None:
        """Put together what the ranks have found, each for the edits in its chunks; they all go on with the same."""
        ranks = self.window.adapter.ranks
        if not ranks.together:
            return
        own = torch.zeros_like(losses.nll, dtype=torch.bool)
        for chunk in chunks:
            if chunk.counts:
                own[chunk.edits] = True
        losses.margin[~own] = 0.0  # every edit is one rank's: the sum is what that rank has found
        values = [losses.nll, losses.kl, losses.probability, losses.margin]
        packed = torch.cat([torch.stack(values, 1), losses.gradient], 1)
        ranks.sum_(packed)
        for value, found in zip(values, packed.T, strict=False):
            value.copy_(found)
        losses.gradient.copy_(packed[:, len(values) :])
        if first:  # in the next step an edit may be another rank's
            width = ranks.agree(max((len(row) for row in self.reference.values()), default=0))  # the leader has some
            table = losses.nll.new_zeros(len(own), width)
            for edit, row in self.reference.items():
                table[edit] = row if own[edit] else 0.0
            ranks.sum_(table)
            self.reference = dict(enumerate(table))

    def _add(self, chunk: Chunk, delta: Tensor, contexts: Tensor, with_gradient: bool, losses: Losses) -> None:
        window, edits = self.window, chunk.edits.tolist()
        leaf = delta.detach().requires_grad_(with_gradient)
        with torch.set_grad_enabled(with_gradient):
            hidden = window.run(chunk, leaf)
            states = window.adapter.finish(hidden[torch.cat([chunk.read, chunk.essence])])
        known = all(edit in self.reference for edit in edits)
        base = torch.stack([self.reference[edit] for edit in edits]) if known else None
        weights = 1 / (chunk.lengths * contexts[chunk.row_owner])[chunk.row]
        head = _HeadLosses(window.adapter, states, chunk.wanted, weights, base, self.kl_factor, with_gradient)
        if head.essence is not None:
            self.reference.update(zip(edits, head.essence, strict=True))
        if with_gradient:
            losses.gradient += torch.autograd.grad(states, leaf, head.gradient)[0]

        row_nll = head.nll.new_zeros(len(chunk.lengths))
        row_nll.index_add_(0, chunk.row, head.nll / chunk.lengths[chunk.row])
        losses.nll.index_add_(0, chunk.row_owner, row_nll.to(losses.nll))
        losses.probability.index_add_(0, chunk.row_owner, torch.exp(-row_nll).to(losses.nll))
        losses.kl.index_add_(0, chunk.edits, (self.kl_factor * head.divergence).to(losses.kl))
        losses.margin.scatter_reduce_(0, chunk.row_owner[chunk.row], head.margin.to(losses.margin), "amin")


class _HeadLosses:
    """Losses at the head and their gradient with respect to what the head reads, by the formulas.

    A block of states at a time, so that few matrices of the size of the vocabulary exist at once. The states are
    ``(target tokens + KL terms, d_head)``; ``base`` ``(KL terms, vocabulary)`` are log-probabilities of the unchanged
    model, ``None`` if these are they.

    Attributes:
        nll: ``(target tokens,)``.
        margin: ``(target tokens,)``, lead of the target token over the best other one.
        divergence: ``(KL terms,)``, KL(p_now || p_unchanged), the direction of the reference implementations.
        essence: ``(KL terms, vocabulary)``, log-probabilities; kept only if ``base`` was not given.
        gradient: Of the states, ``(target tokens + KL terms, d_head)``.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        states: Tensor,
        wanted: Tensor,
        weights: Tensor,
        base: Tensor | None,
        kl_factor: float,
        with_gradient: bool,
    ) -> None:
        self.gradient = torch.zeros_like(states)
        nlls, margins, divergences, essences = [], [], [], []
        count = len(wanted)
        at_once = max(1, min(_HEAD_ROWS, LARGE // (4 * adapter.head.weight.shape[0])))
        blocks = states.detach().tensor_split(max(1, math.ceil(len(states) / at_once)))
        first = 0
        for block in blocks:
            block.requires_grad_(with_gradient)
            with torch.set_grad_enabled(with_gradient):
                logits = adapter.logits(block)
            logp = torch.log_softmax(logits.detach(), -1)
            split = min(max(count - first, 0), len(block))
            said, label, weight = logp[:split], wanted[first : first + split], weights[first : first + split]
            nlls.append(-said.gather(1, label[:, None])[:, 0])
            margins.append(_margins(said, label))
            essence = logp[split:]
            done = max(first - count, 0)
            change = torch.zeros_like(essence) if base is None else essence - base[done : done + len(essence)]
            divergences.append((essence.exp() * change).sum(1))
            if base is None:
                essences.append(essence.clone())
            if with_gradient:
                slope = logp.exp_()  # softmax - one-hot, and p (log p - log q - KL)
                slope[:split] *= weight[:, None]
                slope[:split].scatter_add_(1, label[:, None], -weight[:, None].to(slope))
                slope[split:] *= change.sub_(divergences[-1][:, None]).mul_(kl_factor)
                self.gradient[first : first + len(block)] = torch.autograd.grad(logits, block, slope)[0]
            first += len(block)
        self.nll, self.margin, self.divergence = torch.cat(nlls), torch.cat(margins), torch.cat(divergences)
        self.essence = torch.cat(essences) if base is None else None


def _margins(logp: Tensor, label: Tensor) -> Tensor:
    """Return the lead of each row's labelled entry over its best other one; ``logp`` is written, and put back."""
    own = logp.gather(1, label[:, None])
    others = logp.scatter_(1, label[:, None], -math.inf).amax(1)
    logp.scatter_(1, label[:, None], own)
    return own[:, 0] - others
