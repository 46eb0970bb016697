"""Causal tracing: where in a model the recall of a fact passes (Meng et al. 2022, arXiv 2202.05262)."""

from lit_edit.studies.tracing.facts import KnownFact, read_facts
from lit_edit.studies.tracing.prompts import TokenizedFact, tokenize_fact
from lit_edit.studies.tracing.summary import average_effects, fraction_restored
from lit_edit.studies.tracing.trace import KINDS, FactTrace, trace_fact

__all__ = [
    "KINDS",
    "FactTrace",
    "KnownFact",
    "TokenizedFact",
    "average_effects",
    "fraction_restored",
    "read_facts",
    "tokenize_fact",
    "trace_fact",
]
