"""Metrics of the field: torchmetrics classes and their functional twins."""

from lit_edit.metrics import functional
from lit_edit.metrics.classes import (
    Agreement,
    ExactAccuracy,
    HarmonicScore,
    Magnitude,
    Success,
    TextPerplexity,
    TokenAccuracy,
)

__all__ = [
    "Agreement",
    "ExactAccuracy",
    "HarmonicScore",
    "Magnitude",
    "Success",
    "TextPerplexity",
    "TokenAccuracy",
    "functional",
]
