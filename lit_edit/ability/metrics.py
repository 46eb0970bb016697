"""Accuracy, F1 and MCC of choices among options, each with a confidence interval.

With a hundred items an accuracy is known to about ten points: never read one without its interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torchmetrics.functional.classification import multiclass_f1_score

NONE = -1  # the choice of a model that named no option, or several
RESAMPLES = 500
_LEVEL = 0.95
_Z = 1.959964  # of that level, normal distribution


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927), which unlike the normal one is sound near 0 and 1.

    Example:
        >>> low, high = wilson(8, 10)
        >>> round(low, 3), round(high, 3)
        (0.49, 0.943)
    """
    if not 0 <= hits <= trials or not trials:
        raise ValueError(f"expected 0 <= hits <= trials and a trial, got {hits} of {trials}")
    share, square = hits / trials, _Z**2 / trials
    middle = (share + square / 2) / (1 + square)
    spread = _Z / (1 + square) * math.sqrt(share * (1 - share) / trials + square / (4 * trials))
    return max(0.0, middle - spread), min(1.0, middle + spread)


def weighted_f1(gold: Tensor, chosen: Tensor, options: int) -> Tensor:
    """Return the F1 of each option, averaged by how often it is right (``f1`` of the published editing benchmarks).

    Of indices of the right and of the chosen option, ``(items,)`` or ``(samples, items)``: a scalar, or one per sample.
    :data:`NONE` counts as wrong.

    Example:
        >>> weighted_f1(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1]), 2)
        tensor(0.7333)
    """
    every: Literal["samplewise", "global"] = "samplewise" if gold.dim() == 2 else "global"
    result: Tensor = multiclass_f1_score(
        _named(chosen, options), gold, options + 1, average="weighted", multidim_average=every, validate_args=False
    )
    return result


def matthews(gold: Tensor, chosen: Tensor, options: int) -> Tensor:
    """Return Matthews' correlation coefficient (Gorodkin 2004); shapes as in F1.

    It is 0 where it is 0/0, as of a model that always says the same. torchmetrics has it for one set at a time only,
    and something else than 0 of two options.

    Example:
        >>> matthews(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1]), 2)
        tensor(0.5774, dtype=torch.float64)
    """
    right = (gold == chosen).sum(-1).double()
    named, true = (one_hot(x, options + 1).sum(-2).double() for x in (_named(chosen, options), gold))
    items = gold.shape[-1]
    covered = right * items - (true * named).sum(-1)
    spread = (items**2 - (true**2).sum(-1)) * (items**2 - (named**2).sum(-1))
    return torch.where(spread > 0, covered / spread.clamp(min=1).sqrt(), torch.zeros_like(covered))


def _named(chosen: Tensor, options: int) -> Tensor:
    return torch.where(chosen == NONE, options, chosen)


def bootstrap(
    metric: Callable[[Tensor, Tensor], Tensor],
    gold: Tensor,
    chosen: Tensor,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """Return the 95 % percentile interval of a metric over resampled items (Efron 1979); the same on every machine.

    The same items are drawn from ``gold`` and ``chosen``, both ``(items,)``; the metric takes both as
    ``(samples, items)`` and returns ``(samples,)``.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(gold), (resamples, len(gold)), generator=generator)
    values = metric(gold[drawn], chosen[drawn]).double()
    tail = (1 - _LEVEL) / 2
    low, high = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def score_choices(gold: Sequence[int], chosen: Sequence[int], options: int) -> dict[str, float]:
    """Return accuracy, weighted F1 and MCC of chosen options, each with the ends of its 95 % interval.

    Raises:
        ValueError: If there are no items, or not as many choices.
    """
    if len(gold) != len(chosen) or not gold:
        raise ValueError(f"expected a choice per item and an item, got {len(chosen)} choices for {len(gold)} items")
    right, said = torch.tensor(gold), torch.tensor(chosen)
    hits = int((right == said).sum())
    low, high = wilson(hits, len(gold))
    scores = {"accuracy": hits / len(gold), "accuracy_low": low, "accuracy_high": high}
    metrics: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {"f1": weighted_f1, "mcc": matthews}
    for name, metric in metrics.items():
        low, high = bootstrap(lambda g, c, m=metric: m(g, c, options), right, said)  # type: ignore[misc]
        scores |= {name: metric(right, said, options).item(), f"{name}_low": low, f"{name}_high": high}
    return scores


def accuracy_change(gold: Sequence[int], before: Sequence[int], after: Sequence[int]) -> dict[str, float]:
    """Return how much the accuracy on the same items has changed, with its 95 % interval.

    Answers to the same item are compared: what they have in common cancels out, so that a change is seen which two
    separate intervals would hide. The interval is that of Agresti and Min 2005 for matched proportions (half an item
    more of each of the four kinds), which has a width also where no answer has changed.

    Example:
        >>> found = accuracy_change([0, 1, 1, 0], [0, 1, 0, 1], [0, 1, 1, 1])
        >>> [round(found[name], 3) for name in ("accuracy", "accuracy_low", "accuracy_high")]
        [0.25, -0.276, 0.609]
    """
    right = torch.tensor(gold)
    was, now = torch.tensor(before) == right, torch.tensor(after) == right
    gained, lost, count = int((now & ~was).sum()), int((was & ~now).sum()), len(gold)
    middle = (gained - lost) / (count + 2)
    error = math.sqrt(gained + lost + 1 - (gained - lost) ** 2 / (count + 2)) / (count + 2)
    low, high = max(-1.0, middle - _Z * error), min(1.0, middle + _Z * error)
    return {"accuracy": (gained - lost) / count, "accuracy_low": low, "accuracy_high": high}


def majority(gold: Sequence[int]) -> float:
    """Return the accuracy of always naming the option that is right most often.

    Example:
        >>> majority([0, 1, 1, 1])
        0.75
    """
    return max(gold.count(option) for option in set(gold)) / len(gold)
