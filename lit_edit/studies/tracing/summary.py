"""From traces of facts to the field's numbers: average indirect effects, and how much each layer restores."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lit_edit.studies.tracing.prompts import ROLES, role_of
from lit_edit.studies.tracing.trace import FactTrace


@dataclass(frozen=True)
class AverageEffect:
    """The average indirect effect of one kind of restoration at one layer and token role."""

    kind: str  # what was restored
    role: str  # of the token, one of :data:`lit_edit.studies.tracing.prompts.ROLES`
    layer: int
    effect: float  # mean over the facts that have tokens of this role; of several tokens of a fact the mean first
    error: float  # its standard error; NaN of a single fact
    facts: int  # how many


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of some numbers and its standard error, NaN of a single one.

    Example:
        >>> mean_and_error([1.0, 3.0])
        (2.0, 1.0)
    """
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def effects_by_role(trace: FactTrace, kind: str) -> dict[str, list[float]]:
    """Return a fact's indirect effect per layer, by role; the mean over the tokens of a role."""
    first = trace.subject[0]
    columns: dict[str, list[int]] = {}
    for position in range(first, len(trace.tokens)):
        role = role_of(position, trace.subject, len(trace.tokens))
        columns.setdefault(str(role), []).append(position - first)
    rows = trace.effects(kind)
    return {role: [math.fsum(row[c] for c in found) / len(found) for row in rows] for role, found in columns.items()}


def average_effects(traces: Sequence[FactTrace]) -> list[AverageEffect]:
    """Return the average indirect effect by kind, token role and layer, over facts traced on one model."""
    averages = []
    for kind in traces[0].restored if traces else ():
        by_fact = [effects_by_role(trace, kind) for trace in traces]
        for role in ROLES:
            curves = [effects[role] for effects in by_fact if role in effects]
            for layer, values in enumerate(zip(*curves, strict=True)):
                averages.append(AverageEffect(kind, role, layer, *mean_and_error(values), len(values)))
    return averages


def total_effect(traces: Iterable[FactTrace]) -> tuple[float, float]:
    """Return the average total effect, clean less corrupted probability, and its standard error."""
    return mean_and_error([trace.p_clean - trace.p_corrupt for trace in traces])


def fraction_restored(trace: FactTrace, kind: str) -> list[float]:
    r"""Return, per layer, the share of what the noise took that restoring one token brings back, at the best token.

    Hase et al. 2023 (arXiv 2301.04213):
    :math:`\max_t \max(0, (p_{restored} - p_{corrupt}) / |p_{corrupt} - p_{clean}|)`.

    One number per layer; NaN where the noise took nothing.

    Example:
        >>> trace = FactTrace("0", "a b", ("a", " b"), (0, 1), "c", 0.9, 0.1, {"mlp": ((0.3, 0.0), (0.0, 0.0))})
        >>> [round(share, 3) for share in fraction_restored(trace, "mlp")]
        [0.25, 0.0]
    """
    taken = abs(trace.p_corrupt - trace.p_clean)
    if taken == 0:
        return [math.nan] * len(trace.restored[kind])
    return [max(0.0, max(row) / taken) for row in trace.effects(kind)]
