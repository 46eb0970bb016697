"""What was measured of one candidate, and which of two is better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lit_edit.files.paths import without_nan
from lit_edit.metrics.evaluation import KINDS, Summary
from lit_edit.studies.layers.candidates import Layers, shown

Stage = Literal["single", "group", "held out"]

MOST_PERPLEXITY = 1.5
"""A candidate under which the perplexity of ordinary text grows by more than this factor has broken the model."""


@dataclass(frozen=True)
class Trial:
    """The sample's edits, made at some layers of the unedited model and measured together at the end.

    Attributes:
        stage: Of the search.
        layers: That were edited.
        edits: How many were made of the sample, from its beginning.
        score: Harmonic mean of the three success rates; ``None`` if the edits could not be made.
        efficacy: Share of edits whose new object is likelier than the old.
        generalization: The same at paraphrases.
        locality: Share of neighbours whose own object is likelier than the new one.
        magnitude: Mean over the three kinds of the difference of probabilities.
        agreement: Share of first choices at neighbours as before editing.
        perplexity: Of ordinary text.
        perplexity_before: The same, of the unedited model.
        refused: Edits that were not made since they would have broken something.
        seconds: That it took.
        error: Why the edits could not be made.
    """

    stage: Stage
    layers: Layers
    edits: int
    score: float | None = None
    efficacy: float | None = None
    generalization: float | None = None
    locality: float | None = None
    magnitude: float | None = None
    agreement: float | None = None
    perplexity: float | None = None
    perplexity_before: float | None = None
    refused: int = 0
    seconds: float = 0.0
    error: str = ""

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
            efficacy=summary["efficacy"]["success"],
            generalization=summary["generalization"]["success"],
            locality=summary["locality"]["success"],
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

    def as_dict(self) -> dict[str, Any]:
        """Return the trial as primitives; what is not finite is ``None``."""
        row: dict[str, Any] = without_nan({**asdict(self), "layers": list(self.layers)})
        return row

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Trial:
        """Restore :meth:`as_dict`."""
        return cls(**{**row, "layers": tuple(row["layers"])})


def _number(value: float | None, otherwise: float = -math.inf) -> float:
    return otherwise if value is None or math.isnan(value) else value
