"""The field's metrics as torchmetrics: ``update`` takes one edit's prompts, ``compute`` averages over edits.

As published, prompts are averaged within an edit first, then edits with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_edit.metrics import functional as F  # noqa: N812 - the idiom of torchmetrics


class _ExactMetric(Metric):
    """A metric whose sums keep their type: ``module.to(bfloat16)`` moves them and does not round them."""

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        return super()._apply(lambda state: state.to(fn(state.new_empty(0)).device), exclude_state)


class _MeanOverEdits(_ExactMetric):
    """Mean of one value per edit."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def _add(self, value: Tensor) -> None:
        self.total += value.to(self.total)
        self.count += 1

    def compute(self) -> Tensor:
        """Return the mean over the edits seen; NaN when there were none."""
        return self.total / self.count


class Success(_MeanOverEdits):
    """Share of prompts on which the wanted object is likelier (ES, PS, NS); twin of :func:`functional.success`.

    Example:
        >>> metric = Success()
        >>> metric.update(torch.tensor([1.0]), torch.tensor([2.0]))
        >>> metric.update(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]))
        >>> metric.compute().item()
        0.75
    """

    def update(self, preferred: Tensor, other: Tensor) -> None:
        """Add one edit: ``(prompts,)`` nll of the object that should win, and of the other."""
        self._add(F.success(preferred, other))


class Magnitude(_MeanOverEdits):
    """Mean difference of probabilities (EM, PM, NM); twin of :func:`functional.magnitude`."""

    def update(self, preferred: Tensor, other: Tensor) -> None:
        """Add one edit: ``(prompts,)`` nll of the object that should win, and of the other."""
        self._add(F.magnitude(preferred, other))


class ExactAccuracy(_MeanOverEdits):
    """Share of prompts with all object tokens right; twin of :func:`functional.accuracy`."""

    def update(self, hits: Sequence[Tensor]) -> None:
        """Add one edit: per prompt, a boolean per object token."""
        self._add(F.accuracy(hits))


class TokenAccuracy(_MeanOverEdits):
    """Share of object tokens right, as zsRE counts; twin of :func:`functional.token_accuracy`."""

    def update(self, hits: Sequence[Tensor]) -> None:
        """Add one edit: per prompt, a boolean per object token."""
        self._add(F.token_accuracy(hits))


class Agreement(_MeanOverEdits):
    """Share of first choices as before editing; twin of :func:`functional.agreement`."""

    def update(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        """Add one edit: per prompt, the first-choice token ids before and after."""
        self._add(F.agreement(before, after))


class TextPerplexity(_ExactMetric):
    """Perplexity of texts; ``compute`` returns mean, median and corpus; twin of :func:`functional.perplexity`.

    Example:
        >>> metric = TextPerplexity()
        >>> metric.update([torch.zeros(3)])
        >>> metric.compute()
        {'mean': 1.0, 'median': 1.0, 'corpus': 1.0}
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    nll: list[Tensor]
    length: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("nll", [], dist_reduce_fx="cat")
        self.add_state("length", [], dist_reduce_fx="cat")

    def update(self, nlls: Sequence[Tensor]) -> None:
        """Add texts: per text, the nll of each scored token."""
        for nll in nlls:
            if nll.numel():
                self.nll.append(nll.double().to(self.device))
                self.length.append(torch.tensor([nll.numel()], device=self.device))

    def compute(self) -> dict[str, float]:
        """Return ``{"mean", "median", "corpus"}``."""
        if not len(self.length):
            return F.perplexity([])
        lengths = dim_zero_cat(self.length).tolist()  # lists, or joined already where ranks have put theirs together
        return F.perplexity(dim_zero_cat(self.nll).split(lengths))


class HarmonicScore(_ExactMetric):
    """Harmonic mean of the three success rates (S); twin of :func:`functional.harmonic_score`.

    Edits without a probe of some kind do not count for that kind.

    Example:
        >>> metric = HarmonicScore()
        >>> win, lose = torch.tensor([1.0]), torch.tensor([2.0])
        >>> metric.update(efficacy=(win, lose), generalization=(win, lose), locality=(win, lose))
        >>> metric.compute().item()
        1.0
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    totals: Tensor
    counts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("totals", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(3, dtype=torch.long), dist_reduce_fx="sum")

    def update(
        self,
        efficacy: tuple[Tensor, Tensor] | None = None,
        generalization: tuple[Tensor, Tensor] | None = None,
        locality: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Add one edit: per kind ``(preferred, other)``, each ``(prompts,)`` nll."""
        for index, pair in enumerate((efficacy, generalization, locality)):
            if pair is not None:
                self.totals[index] += F.success(*pair)
                self.counts[index] += 1

    def compute(self) -> Tensor:
        """Return the score; NaN when a kind has no prompts."""
        rates = [t / c if c else None for t, c in zip(self.totals.tolist(), self.counts.tolist(), strict=True)]
        score = F.harmonic_score(rates)
        return torch.tensor(float("nan") if score is None else score, dtype=torch.float64)
