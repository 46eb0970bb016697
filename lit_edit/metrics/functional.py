"""Formulas of the field's metrics on plain tensors.

Three families that must not be mixed: *success* compares the likelihood of two objects, *magnitude* subtracts their
probabilities, *accuracy* asks whether the object is what the model says. ``nll`` is always length-normalised: the mean
negative log-likelihood of the object's tokens.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def success(preferred: Tensor, other: Tensor) -> Tensor:
    """Share of prompts on which ``preferred`` is the likelier object (ES, PS, NS of CounterFact, arXiv 2202.05262).

    Args:
        preferred: ``(prompts,)`` nll of the object that should win.
        other: ``(prompts,)`` nll of the other one; a tie is no success.

    Example:
        >>> success(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0]))
        tensor(0.5000)
    """
    _check_pairs(preferred, other)
    return (preferred < other).to(preferred).mean()


def magnitude(preferred: Tensor, other: Tensor) -> Tensor:
    """Mean difference of the objects' probabilities (EM, PM, NM of CounterFact, arXiv 2202.05262).

    Args:
        preferred: ``(prompts,)`` nll of the object that should win.
        other: ``(prompts,)`` nll of the other one.

    Example:
        >>> magnitude(torch.tensor([0.0]), torch.tensor([float("inf")]))
        tensor(1.)
    """
    _check_pairs(preferred, other)
    return (torch.exp(-preferred) - torch.exp(-other)).mean()


def accuracy(hits: Sequence[Tensor]) -> Tensor:
    """Share of prompts on which *every* token of the object is the model's first choice (teacher forcing).

    Args:
        hits: Per prompt, a boolean per object token.

    Example:
        >>> accuracy([torch.tensor([True, False]), torch.tensor([True])])
        tensor(0.5000)
    """
    _check_hits(hits)
    return torch.stack([h.all() for h in hits]).float().mean()


def token_accuracy(hits: Sequence[Tensor]) -> Tensor:
    """Share of object tokens that are the model's first choice, averaged over prompts (zsRE; EasyEdit's ``*_acc``).

    Args:
        hits: Per prompt, a boolean per object token.

    Example:
        >>> token_accuracy([torch.tensor([True, False]), torch.tensor([True])])
        tensor(0.7500)
    """
    _check_hits(hits)
    return torch.stack([h.float().mean() for h in hits]).mean()


def agreement(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """Share of first-choice tokens over an answer that are as before editing, averaged over prompts.

    Args:
        before: Per prompt, the first-choice token ids of the unedited model.
        after: The same of the edited model.

    Example:
        >>> agreement([torch.tensor([5, 6])], [torch.tensor([5, 7])])
        tensor(0.5000)
    """
    if len(before) != len(after):
        raise ValueError(f"expected as many prompts before as after, got {len(before)} and {len(after)}")
    for b, a in zip(before, after, strict=True):
        if b.shape != a.shape:
            raise ValueError(f"expected as many tokens before as after, got {b.numel()} and {a.numel()}")
    return token_accuracy([b == a for b, a in zip(before, after, strict=True)])


def perplexity(nlls: Iterable[Tensor]) -> dict[str, float]:
    """Perplexity of texts: mean and median over texts of ``exp(mean token nll)``, and of the corpus as a whole.

    The mean over texts is ME-PPL's (arXiv 2402.09656); it has a heavy tail, so the others stand beside it.

    Args:
        nlls: Per text, the nll of each scored token; texts without any are left out.

    Returns:
        ``{"mean", "median", "corpus"}``.

    Raises:
        ValueError: If no text has a scored token.

    Example:
        >>> perplexity([torch.tensor([0.0, 0.0])])
        {'mean': 1.0, 'median': 1.0, 'corpus': 1.0}
    """
    scored = [nll.double() for nll in nlls if nll.numel()]
    if not scored:
        raise ValueError("perplexity needs at least one text of two tokens or more")
    per_text = torch.stack([nll.mean() for nll in scored]).exp()
    total = torch.cat(scored).mean().exp()
    return {"mean": per_text.mean().item(), "median": statistics.median(per_text.tolist()), "corpus": total.item()}


def harmonic_score(values: Sequence[float | None]) -> float | None:
    """Harmonic mean of efficacy, generalization and locality success (S of CounterFact); ``None`` if one is missing.

    Example:
        >>> harmonic_score([1.0, 0.5, 1.0])
        0.75
        >>> harmonic_score([1.0, None, 1.0])
    """
    known = [value for value in values if value is not None and not math.isnan(value)]
    if not known or len(known) < len(values):
        return None
    return len(known) / sum(1 / value for value in known) if min(known) > 0 else 0.0


def _check_pairs(preferred: Tensor, other: Tensor) -> None:
    if preferred.shape != other.shape or preferred.dim() != 1 or not preferred.numel():
        raise ValueError(
            "expected two equally long, non-empty vectors of nll, "
            f"got {tuple(preferred.shape)} and {tuple(other.shape)}"
        )


def _check_hits(hits: Sequence[Tensor]) -> None:
    if not hits or any(h.dim() != 1 or not h.numel() for h in hits):
        raise ValueError("expected at least one prompt, each with at least one object token")
