"""Metrics of the field: torchmetrics classes and their functional twins."""

from lit_edit.metrics import functional
from lit_edit.metrics.classes import (
    AgeCurve,
    Agreement,
    Consistency,
    ExactAccuracy,
    ExactMatch,
    Fluency,
    HarmonicScore,
    Magnitude,
    PortabilityAccuracy,
    Success,
    TextPerplexity,
    TokenAccuracy,
)

__all__ = [
    "AgeCurve",
    "Agreement",
    "Consistency",
    "ExactAccuracy",
    "ExactMatch",
    "Fluency",
    "HarmonicScore",
    "Magnitude",
    "PortabilityAccuracy",
    "Success",
    "TextPerplexity",
    "TokenAccuracy",
    "functional",
]
