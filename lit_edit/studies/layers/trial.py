"""What was measured of one candidate, and which of two is better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lit_edit.metrics.evaluation import KINDS, Summary
from lit_edit.studies.layers.candidates import Layers, shown

Stage = Literal["single", "group", "held out"]

MOST_PERPLEXITY = 1.5
"""A candidate under which the perplexity of ordinary text grows by more than this factor has broken the model."""


@dataclass(frozen=True)
class Trial:
    """The sample's edits, made at some layers of the unedited model and measured together at the end."""

    stage: Stage
    layers: Layers
    edits: int  # made of the sample, from its beginning
    score: float | None = None  # harmonic mean of the three success rates; None if the edits could not be made
    efficacy: float | None = None  # share of edits whose new object is likelier than the old
    generalization: float | None = None  # the same at paraphrases
    locality: float | None = None  # share of neighbours whose own object is likelier than the new one
    magnitude: float | None = None  # mean over the three kinds of the difference of probabilities
    agreement: float | None = None  # share of first choices at neighbours as before editing
    perplexity: float | None = None  # of ordinary text
    perplexity_before: float | None = None
    refused: int = 0  # edits that were not made since they would have broken something
    seconds: float = 0.0
    error: str = ""  # why the edits could not be made

    @classmethod
    def of(
        cls, stage: Stage, layers: Layers, edits: int, summary: Summary, before: float, refused: int, seconds: float
    ) -> Trial:
        """Make a trial of a summary (:func:`lit_edit.metrics.evaluation.summarise`)."""
        magnitudes = [summary[kind]["magnitude"] for kind in KINDS]
        return cls(
            stage,
            layers,
            edits,
            summary["score"],
            **{kind: summary[kind]["success"] for kind in KINDS},
            magnitude=None if None in magnitudes else sum(magnitudes) / len(magnitudes),
            agreement=summary["locality"]["agreement"],
            perplexity=summary["perplexity"],
            perplexity_before=before,
            refused=refused,
            seconds=seconds,
        )

    @property
    def key(self) -> tuple[str, Layers, int]:
        """What a trial is known by: whichever round asks for it, it is made once."""
        return "held out" if self.stage == "held out" else "search", self.layers, self.edits

    @property
    def growth(self) -> float | None:
        """Perplexity after over perplexity before."""
        if not self.perplexity or not self.perplexity_before:
            return None
        return self.perplexity / self.perplexity_before

    @property
    def broken(self) -> bool:
        """Whether the edits could not be made, or broke the model."""
        growth = self.growth
        return self.score is None or growth is None or not growth <= MOST_PERPLEXITY

    @property
    def rank(self) -> tuple[bool, float, float, float]:
        """By which trials over the same edits are compared; the larger, the better.

        A model that is not broken before one that is; then the score; where that is equal, as it often is over few
        edits, the mean of the magnitudes; then the lower perplexity.
        """
        return (
            not self.broken,
            round(_number(self.score), 9),
            round(_number(self.magnitude), 9),
            -_number(self.growth, math.inf),
        )

    @property
    def name(self) -> str:
        """The layers, for people."""
        return shown(self.layers)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Trial:
        """Restore what :func:`~dataclasses.asdict` and JSON have made of a trial."""
        return cls(**{**row, "layers": tuple(row["layers"])})


def _number(value: float | None, otherwise: float = -math.inf) -> float:
    return otherwise if value is None or math.isnan(value) else value
