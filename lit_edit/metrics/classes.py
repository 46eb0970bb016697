"""The field's metrics as torchmetrics: ``update`` takes one edit's prompts, ``compute`` averages over edits.

As published, prompts are averaged within an edit first, then edits with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_edit.metrics import functional as F  # noqa: N812 - the idiom of torchmetrics
from lit_edit.metrics.ages import aged
from lit_edit.metrics.texts import consistency, exact_match, fluency

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer


class _EditMetric(Metric):
    """A metric whose states keep their type: ``module.to(bfloat16)`` moves them and does not round them."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def _add_sums(self, *shape: int) -> None:
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(shape, dtype=torch.long), dist_reduce_fx="sum")

    def _add_lists(self, *names: str) -> None:
        for name in names:
            self.add_state(name, [], dist_reduce_fx="cat")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        return super()._apply(lambda state: state.to(fn(state.new_empty(0)).device), exclude_state)


class _MeanOverEdits(_EditMetric):
    """Mean of one value per edit: of its :attr:`formula`, the functional twin, whose arguments ``update`` takes."""

    formula: Callable[..., Tensor | float]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_sums()

    def update(self, *edit: Any) -> None:
        """Add one edit, as the formula takes it."""
        self.total += torch.as_tensor(self.formula(*edit)).to(self.total)
        self.count += 1

    def compute(self) -> Tensor:
        """Return the mean over the edits seen; NaN when there were none."""
        return self.total / self.count


class _MeansByKind(_EditMetric):
    """A mean per kind of probes; edits without a probe of some kind do not count for that kind."""

    def __init__(self, kinds: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kinds = list(kinds)
        self._add_sums(len(kinds))

    def _add(self, kind: str, value: Tensor) -> None:
        self.total[self.kinds.index(kind)] += value
        self.count[self.kinds.index(kind)] += 1

    def _means(self) -> dict[str, float]:
        """Return the mean over edits, of the kinds that any had."""
        sums = zip(self.kinds, self.total.tolist(), self.count.tolist(), strict=True)
        return {kind: total / count for kind, total, count in sums if count}


class Success(_MeanOverEdits):
    """Share of prompts on which the wanted object is likelier (ES, PS, NS); twin of :func:`functional.success`.

    Example:
        >>> metric = Success()
        >>> metric.update(torch.tensor([1.0]), torch.tensor([2.0]))
        >>> metric.update(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]))
        >>> metric.compute().item()
        0.75
    """

    formula = staticmethod(F.success)


class Magnitude(_MeanOverEdits):
    """Mean difference of probabilities (EM, PM, NM); twin of :func:`functional.magnitude`."""

    formula = staticmethod(F.magnitude)


class ExactAccuracy(_MeanOverEdits):
    """Share of prompts with all object tokens right; twin of :func:`functional.accuracy`."""

    formula = staticmethod(F.accuracy)


class TokenAccuracy(_MeanOverEdits):
    """Share of object tokens right, as zsRE counts; twin of :func:`functional.token_accuracy`."""

    formula = staticmethod(F.token_accuracy)


class Agreement(_MeanOverEdits):
    """Share of first choices as before editing; twin of :func:`functional.agreement`."""

    formula = staticmethod(F.agreement)


class Fluency(_MeanOverEdits):
    """Weighted n-gram entropy of generated texts, in bits (GE); twin of :func:`lit_edit.metrics.texts.fluency`.

    Example:
        >>> metric = Fluency()
        >>> metric.update(["one two three four", "so so so so"])
        >>> round(metric.compute().item(), 4)  # of the first (log2(3) + 2) / 3, of the second 0
        0.5975
    """

    formula = staticmethod(fluency)


class Consistency(_MeanOverEdits):
    """TF-IDF cosine of generated texts and references (RS); twin of :func:`lit_edit.metrics.texts.consistency`.

    The term weights are those of a vectorizer (:func:`lit_edit.metrics.texts.fit_vectorizer`).
    """

    def __init__(self, vectorizer: TfidfVectorizer, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.vectorizer = vectorizer

    def formula(self, texts: Sequence[str], references: Sequence[str]) -> float:
        """Return the consistency of one edit."""
        return consistency(texts, references, self.vectorizer)


class ExactMatch(_MeanOverEdits):
    """Share of answers that are the target but for case, marks and articles.

    ``update(answers, target)``: generated answers, at least one, and what they should be.

    Example:
        >>> metric = ExactMatch()
        >>> metric.update(["the Hague", "Rome"], "The Hague.")
        >>> metric.compute().item()
        0.5
    """

    @staticmethod
    def formula(answers: Sequence[str], target: str) -> float:
        """Return the share of one edit."""
        if not answers:
            raise ValueError("expected at least one answer")
        return sum(exact_match(answer, target) for answer in answers) / len(answers)


class PortabilityAccuracy(_MeansByKind):
    """Share of answer tokens right on what follows from the edits, per kind (EasyEdit's ``portability``).

    Example:
        >>> metric = PortabilityAccuracy(["alias", "reasoning"])
        >>> metric.update({"alias": [torch.tensor([True, False])]})
        >>> metric.compute()
        {'alias': 0.5}
    """

    def update(self, hits: Mapping[str, Sequence[Tensor]]) -> None:
        """Add one edit: by kind, per prompt, a boolean per answer token."""
        for kind, found in hits.items():
            if found:
                self._add(kind, F.token_accuracy(found))

    def compute(self) -> dict[str, float]:
        """Return the mean over edits, of the kinds that any had."""
        return self._means()


class AgeCurve(_EditMetric):
    """A value by the age of the edit; twin of :func:`lit_edit.metrics.ages.aged`, with its ``width`` and ``ends``.

    Example:
        >>> metric = AgeCurve(width=2, ends=1)
        >>> for number, value in enumerate([0.0, 1.0, 1.0]):
        ...     metric.update(number, value)
        >>> found = metric.compute()
        >>> found["early"], found["late"], [bin["mean"] for bin in found["curve"]]
        (0.0, 1.0, [1.0, 0.0])
    """

    numbers: list[Tensor]
    values: list[Tensor]

    def __init__(self, width: int, ends: int | float = 100, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_lists("numbers", "values")
        self.width, self.ends = width, ends

    def update(self, number: int, value: float | None) -> None:
        """Add one edit: its place in the order of making, and its value now, if it has one."""
        self.numbers.append(torch.tensor([number], device=self.device))
        known = float("nan") if value is None else value
        self.values.append(torch.tensor([known], dtype=torch.float64, device=self.device))

    def compute(self) -> dict[str, Any]:
        """Return ``{"early", "late", "size", "curve": [{"youngest", "oldest", "mean", "count"}]}``."""
        values: list[float | None] = []
        if len(self.numbers):
            order = dim_zero_cat(self.numbers).argsort()
            values = [None if value != value else value for value in dim_zero_cat(self.values)[order].tolist()]
        return aged(values, self.width, self.ends)


class TextPerplexity(_EditMetric):
    """Perplexity of texts; ``compute`` returns mean, median and corpus; twin of :func:`functional.perplexity`.

    Example:
        >>> metric = TextPerplexity()
        >>> metric.update([torch.zeros(3)])
        >>> metric.compute()
        {'mean': 1.0, 'median': 1.0, 'corpus': 1.0}
    """

    higher_is_better = False
    nll: list[Tensor]
    length: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_lists("nll", "length")

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


class HarmonicScore(_MeansByKind):
    """Harmonic mean of the three success rates (S); twin of :func:`functional.harmonic_score`.

    Example:
        >>> metric = HarmonicScore()
        >>> win, lose = torch.tensor([1.0]), torch.tensor([2.0])
        >>> metric.update(efficacy=(win, lose), generalization=(win, lose), locality=(win, lose))
        >>> metric.compute().item()
        1.0
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(("efficacy", "generalization", "locality"), **kwargs)

    def update(
        self,
        efficacy: tuple[Tensor, Tensor] | None = None,
        generalization: tuple[Tensor, Tensor] | None = None,
        locality: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Add one edit: per kind ``(preferred, other)``, each ``(prompts,)`` nll."""
        for kind, pair in zip(self.kinds, (efficacy, generalization, locality), strict=True):
            if pair is not None:
                self._add(kind, F.success(*pair))

    def compute(self) -> Tensor:
        """Return the score; NaN when a kind has no prompts."""
        means = self._means()
        score = F.harmonic_score([means.get(kind) for kind in self.kinds])
        return torch.tensor(float("nan") if score is None else score, dtype=torch.float64)
