"""How an edited model would do with a part of its updates: the table behind the choice of alpha (1-LI, 2303.00046)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from lit_edit.data.request import EditRequest
from lit_edit.errors import check_within
from lit_edit.ledger.edit_ledger import EditLedger
from lit_edit.metrics.evaluation import KINDS, evaluate_edits, summarise
from lit_edit.metrics.functional import harmonic_score

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares to measure when none are given; 0 is the original model."""


@dataclass(frozen=True)
class InterpolationRow:
    """A model with a share of its updates; what was not measured is ``None``."""

    alpha: float  # the share
    efficacy: float | None  # on the prompts of the edits
    generalization: float | None  # on their paraphrases
    locality: float | None  # on their neighbours
    score: float | None  # harmonic mean of the three


@torch.no_grad()
def interpolation_rows(
    ledger: EditLedger,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    alphas: Sequence[float] = SHARES,
    measure: Literal["success", "accuracy", "token_accuracy"] = "success",
) -> list[InterpolationRow]:
    r"""Measure an edited model with shares of its updates, :math:`(1 - \alpha) W_0 + \alpha W`; it is not changed.

    Measured are edits that were made, or some that were held out; ``measure`` names the family of metrics.

    Raises:
        ValueError: If a share is not in [0, 1], or there is nothing to measure.
    """
    if not requests:
        raise ValueError("requests must hold at least one edit to measure, got none")
    for alpha in alphas:
        check_within("[0, 1]", alphas=alpha)
    rows = []
    for alpha in alphas:
        weights = {  # rounded as the ledger would
            name: ledger.edited_weight(layer, delta if alpha == 1 else alpha * delta)
            for layer, name in ledger.names.items()
            if (delta := ledger.deltas.get(name)) is not None
        }
        summary = summarise(evaluate_edits(ledger.adapter.with_weights(weights), tokenizer, requests))
        values: dict[str, float | None] = {kind: summary[kind][measure] for kind in KINDS}
        rows.append(InterpolationRow(alpha, **values, score=harmonic_score(list(values.values()))))
    return rows
