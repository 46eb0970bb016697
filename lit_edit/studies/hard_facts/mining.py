"""Hard facts: single edits, each alone on the original model, and what they do to it (HardCF of arXiv 2402.09656)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from lit_edit.data.request import EditRequest
from lit_edit.devices.algebra import for_algebra
from lit_edit.errors import ArgumentError
from lit_edit.files.paths import without_nan
from lit_edit.metrics.evaluation import measure_perplexity
from lit_edit.metrics.scoring import score_continuations
from lit_edit.stream.session import EditSession
from lit_edit.studies.alone import HARMFUL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lit_edit.editors.base import Proposal
    from lit_edit.models.adapter import ModelAdapter

NUMBERS = ("mean", "median", "corpus")


@dataclass(frozen=True)
class SingleEdit:
    """What one edit alone does to the original model. All numbers are NaN of an edit that was refused."""

    id: str  # of its request
    ratio: float = math.nan  # mean perplexity of the texts after over before; infinite where it is not a number
    perplexity: dict[str, float] = field(default_factory=lambda: dict.fromkeys(NUMBERS, math.nan))  # after the edit
    probability: float = math.nan  # of the new object after the prompt, per token (geometric mean)
    probability_before: float = math.nan  # the same on the original model
    said: bool = False  # whether every token of the new object is the first choice
    growth: float = math.nan  # of mean |W|, of the weight that grows most: 0.1 is ten per cent; 0 if none is written
    refused: str = ""  # why there is no such edit: it would have written what is not finite
    request: Mapping[str, Any] = field(default_factory=dict)  # as EditRequest.as_dict has it

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> SingleEdit:
        """Restore what JSON holds of one; what was not finite is infinite, or NaN where the edit was refused.

        Example:
            >>> SingleEdit.from_dict({"id": "1", "ratio": None, "perplexity": {"mean": None}}).ratio
            inf
        """
        lost = math.nan if row.get("refused") else math.inf

        def number(value: Any) -> float:
            return lost if value is None else float(value)

        scalars = ("ratio", "probability", "probability_before", "growth")
        numbers = {name: number(row[name]) for name in scalars if name in row}
        perplexity = {str(name): number(value) for name, value in dict(row["perplexity"]).items()}
        return cls(**{**row, **numbers, "perplexity": perplexity})


class Miner:
    """Tries edits one by one on the original model. Nothing is ever written, so nothing has to be restored.

    The updates that an editor proposes are looked at through a view of the model; the editor never hears of a commit,
    so that every edit is its first. A result depends on no other record.

    The session is of an editor that has made no edit (:meth:`lit_edit.EditStream.open` returns one). With ``leading``
    the tokenizer's leading tokens are put before a text; ME-PPL does not.

    Raises:
        ArgumentError: If the session has made edits, or the perplexity of the original model is not finite.
    """

    def __init__(
        self, session: EditSession, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], leading: bool = False
    ) -> None:
        if session.ledger.made:
            raise ArgumentError("single edits are made on the original model, and this one has been edited")
        self.session, self.tokenizer, self.texts, self.leading = session, tokenizer, list(texts), leading
        self.original = session.ledger.original()
        self.base = self._measure(self.original)
        self._widths = {name: norms["mean_abs_before"] for name, norms in session.ledger.layer_norms().items()}
        if not math.isfinite(self.base["mean"]):
            raise ArgumentError(f"the perplexity of the unedited model is {self.base['mean']}: use other texts")

    def try_edit(self, request: EditRequest) -> SingleEdit:
        """Make an edit in a view of the original model, and measure it."""
        try:
            proposal = self.session.editor.propose([request], [request])
            self.session.ledger.check(proposal.updates, proposal.entries)
        except HARMFUL as error:
            return SingleEdit(request.id, refused=str(error), request=request.as_dict())
        view = self.session.preview(proposal)
        perplexity = self._measure(view)
        [before], [after] = (
            score_continuations(model, self.tokenizer, [(request.text, request.target_new)])
            for model in (self.original, view)
        )
        ratio = perplexity["mean"] / self.base["mean"]
        return SingleEdit(
            request.id,
            ratio if math.isfinite(ratio) else math.inf,
            perplexity,
            math.exp(-after.nll),
            math.exp(-before.nll),
            bool(after.hits.all()),
            self._growth(proposal),
            request=request.as_dict(),
        )

    def _measure(self, model: ModelAdapter) -> dict[str, float]:
        found = measure_perplexity(model, self.tokenizer, self.texts, self.leading)
        return {name: found[name] for name in NUMBERS}

    def _growth(self, proposal: Proposal) -> float:
        ledger = self.session.ledger
        growth = (
            for_algebra(ledger.edited_weight(update.layer, update.delta)).abs().mean().item()
            / self._widths[update.name]
            - 1
            for update in proposal.updates
        )
        return max(growth, default=0.0)


def choose_hard(rows: Sequence[SingleEdit], factor: float = 2.0, keep: int | None = None) -> list[SingleEdit]:
    """Return the edits that break the model, the worst first; those that were refused are none.

    Hard are those whose perplexity ratio is above ``factor``, or the ``keep`` worst, whatever their ratio.

    Example:
        >>> rows = [SingleEdit("a", 1.5), SingleEdit("b", 9.0), SingleEdit("c", refused="NaN"), SingleEdit("d", 2.0)]
        >>> [row.id for row in choose_hard(rows)], [row.id for row in choose_hard(rows, keep=3)]
        (['b'], ['b', 'd', 'a'])
    """
    ranked = sorted((row for row in rows if not row.refused), key=lambda row: -row.ratio)
    return ranked[:keep] if keep is not None else [row for row in ranked if row.ratio > factor]


def as_records(rows: Sequence[SingleEdit], requests: Mapping[str, EditRequest]) -> list[dict[str, Any]]:
    """Return edits as records that lit-edit reads, each with what was measured under ``hard``, which is passed over."""
    measured = {row.id: without_nan(asdict(row)) for row in rows}
    return [
        {**requests[i].as_dict(), "hard": {k: v for k, v in row.items() if k not in ("id", "refused", "request")}}
        for i, row in measured.items()
    ]
