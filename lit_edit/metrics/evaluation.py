"""Measuring edits on a model: all probes of many edits in one batched pass, then the metrics over them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lit_edit.data.request import EditRequest
from lit_edit.metrics import functional
from lit_edit.metrics.classes import Agreement, ExactAccuracy, HarmonicScore, Magnitude, Success, TokenAccuracy
from lit_edit.metrics.scoring import Score, score_continuations, text_nlls
from lit_edit.models.adapter import ModelAdapter

KINDS = ("efficacy", "generalization", "locality")
FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "success": Success,
    "magnitude": Magnitude,
    "accuracy": ExactAccuracy,
    "token_accuracy": TokenAccuracy,
}

Summary = dict[str, Any]
"""``{"efficacy": {"success", "magnitude", "accuracy", "token_accuracy"}, ..., "score", "perplexity"}``"""


@dataclass(frozen=True)
class ProbeResult:
    """One prompt on one model."""

    preferred: float  # nll of the object that should win (the new one; for locality the neighbour's own answer)
    other: float | None  # nll of the other object; None when it is not known
    hits: tuple[bool, ...]  # per token of the preferred object, whether it is the first choice
    choice: tuple[int, ...]  # the first choices


@dataclass(frozen=True)
class EditResult:
    """All probes of one edit on one model."""

    id: str
    efficacy: tuple[ProbeResult, ...]
    generalization: tuple[ProbeResult, ...]
    locality: tuple[ProbeResult, ...]

    def as_state(self) -> dict[str, Any]:
        """Return the result as primitives, for checkpoints."""
        return {"id": self.id} | {
            kind: [[p.preferred, p.other, list(p.hits), list(p.choice)] for p in getattr(self, kind)] for kind in KINDS
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> EditResult:
        """Restore :meth:`as_state`."""
        probes = {
            kind: tuple(ProbeResult(p, o, tuple(hits), tuple(choice)) for p, o, hits, choice in state[kind])
            for kind in KINDS
        }
        return cls(state["id"], **probes)


def evaluate_edits(
    adapter: ModelAdapter, tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest]
) -> list[EditResult]:
    """Score the probes of edits on a model (or a view of it); one result per request, in order."""
    plan: list[list[tuple[str, str, str | None]]] = []  # per request and kind: prompt, preferred, other
    for request in requests:
        new, true = request.target_new, request.target_true
        plan.append([(request.text, new, true)])
        plan.append([(prompt, new, true) for prompt in request.paraphrases])
        plan.append([(probe.prompt, probe.answer, new) for probe in request.neighborhood])
    asked = ((prompt, obj) for rows in plan for prompt, a, b in rows for obj in (a, b) if obj is not None)
    pairs = list(dict.fromkeys(asked))
    scores = dict(zip(pairs, score_continuations(adapter, tokenizer, pairs), strict=True))
    results = [
        tuple(_probe(scores[prompt, a], None if b is None else scores[prompt, b]) for prompt, a, b in rows)
        for rows in plan
    ]
    return [EditResult(r.id, *results[3 * i : 3 * i + 3]) for i, r in enumerate(requests)]


def measure_perplexity(
    adapter: ModelAdapter, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], leading: bool = True
) -> dict[str, float]:
    """Return mean, median and corpus perplexity of texts on a model, with or without leading special tokens."""
    return functional.perplexity(text_nlls(adapter, tokenizer, texts, leading=leading))


class EditMetrics(nn.Module):
    """The metrics over a set of edits: update with results, compute the summary.

    Example:
        >>> probe = ProbeResult(0.5, 2.0, (True,), (7,))
        >>> metrics = EditMetrics()
        >>> metrics.update(EditResult("1", (probe,), (), ()))
        >>> summary = metrics.compute()
        >>> summary["efficacy"]["success"], summary["generalization"]["success"]
        (1.0, None)
    """

    def __init__(self) -> None:
        super().__init__()
        alone = {"sync_on_compute": False}  # every rank has all results: none is to be counted once per rank
        self.kinds = nn.ModuleDict(
            {kind: nn.ModuleDict({name: make(**alone) for name, make in FAMILIES.items()}) for kind in KINDS}
        )
        self.agreement = Agreement(**alone)
        self.harmonic = HarmonicScore(**alone)

    def update(self, result: EditResult, before: EditResult | None = None) -> None:
        """Add one edit's result; ``before`` is the same edit's result on the unedited model."""
        pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for kind in KINDS:
            probes: tuple[ProbeResult, ...] = getattr(result, kind)
            if not probes:
                continue
            family: Any = self.kinds[kind]
            hits = [torch.tensor(p.hits) for p in probes]
            family["accuracy"].update(hits)
            family["token_accuracy"].update(hits)
            others = [p.other for p in probes]
            if all(o is not None for o in others):
                preferred = torch.tensor([p.preferred for p in probes], dtype=torch.float64)
                pairs[kind] = preferred, torch.tensor(others, dtype=torch.float64)
                family["success"].update(*pairs[kind])
                family["magnitude"].update(*pairs[kind])
        self.harmonic.update(**pairs)
        if before is not None and result.locality:
            self.agreement.update(_choices(before), _choices(result))

    def compute(self) -> Summary:
        """Return the summary; a value is ``None`` where no edit had the probes for it."""
        summary: Summary = {}
        for kind in KINDS:
            family: Any = self.kinds[kind]
            summary[kind] = {name: value_of(metric) for name, metric in family.items()}
        summary["locality"]["agreement"] = value_of(self.agreement)
        score = self.harmonic.compute().item()
        summary["score"] = None if math.isnan(score) else score
        return summary


def summarise(
    results: Iterable[EditResult], before: Mapping[str, EditResult] | None = None, perplexity: float | None = None
) -> Summary:
    """Return the summary of the edits' results on some model, in which its perplexity is to stand.

    ``before`` has their results on the unedited model, by id, for agreement.
    """
    metrics = EditMetrics()
    for result in results:
        metrics.update(result, None if before is None else before.get(result.id))
    with warnings.catch_warnings():  # of no edits there are no numbers, and that is no mistake
        warnings.filterwarnings("ignore", "The ``compute`` method of metric")
        return {**metrics.compute(), "perplexity": perplexity}


def flatten(summary: Summary, prefix: str) -> dict[str, float]:
    """Return ``{"prefix/efficacy/success": ...}`` without the missing values, as loggers want it.

    Example:
        >>> flatten({"efficacy": {"success": 1.0}, "score": None}, "final")
        {'final/efficacy/success': 1.0}
    """
    flat: dict[str, float] = {}
    for name, value in summary.items():
        if isinstance(value, Mapping):
            flat |= flatten(dict(value), f"{prefix}/{name}")
        elif value is not None:
            flat[f"{prefix}/{name}"] = float(value)
    return flat


def _probe(preferred: Score, other: Score | None) -> ProbeResult:
    return ProbeResult(
        preferred.nll,
        None if other is None else other.nll,
        tuple(preferred.hits.tolist()),
        tuple(preferred.choice.tolist()),
    )


def _choices(result: EditResult) -> list[Tensor]:
    return [torch.tensor(probe.choice) for probe in result.locality]


def value_of(metric: Any) -> float | None:
    """Return the mean that a metric has found; ``None`` over no edits."""
    return float(metric.compute()) if int(metric.count) else None
