"""A guard against harm: every few edits the model is looked at, and an edit that broke it is named or taken back."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lit_edit.data.datamodule import perplexity_texts
from lit_edit.devices.algebra import for_algebra
from lit_edit.errors import ArgumentError, UserError, check_not_negative, check_one_of
from lit_edit.metrics.evaluation import summarise
from lit_edit.models.adapter import ModelAdapter
from lit_edit.stream.edit_stream import EditStream

from .base import EveryCallback, check_every

log = logging.getLogger(__name__)


class HarmError(UserError):
    """The model is past a bound; the message names the edit that did it and what to do."""


@dataclass(frozen=True)
class Health:
    """How a model does."""

    perplexity: float  # of ordinary sentences, relative to the unedited model; infinite if its logits are not finite
    growth: float  # of mean |W|, of the edited layer that grew most, relative
    agreement: float | None  # share of neighbours' first choices that are what they were, over a fixed sample


class HarmGuard(EveryCallback):
    """Looks at the model after every ``every`` edits, and acts when it is past a bound.

    Which edit did it is found by halving: the edits since the last good look are taken out on a view of the model, and
    the first one is named with which the bound is passed.

    Args:
        every: Look after every so many edits.
        on_harm: ``warn`` and go on, ``stop`` the run, or ``undo``: take the edit back, and others if one is not enough,
            and go on. What no edit since the last look has done alone stops the run.
        max_perplexity: Bound of the perplexity of ordinary sentences, in multiples of the unedited model's; 0 for none.
        max_growth: Bound of the growth of mean |W| of an edited layer, 0.5 for half as large again; 0 for none.
        min_agreement: Bound of the share of neighbours whose first choice is what it was before editing; 0 for none.
        sample: Edits of the stream whose neighbours are looked at: its first ones that have any.
        texts: Sentences, of those that ship.
    """

    def __init__(
        self,
        every: int = 10,
        on_harm: Literal["warn", "stop", "undo"] = "warn",
        max_perplexity: float = 2.0,
        max_growth: float = 0.5,
        min_agreement: float = 0.3,
        sample: int = 8,
        texts: int = 12,
    ) -> None:
        super().__init__(check_every(every, "every"))
        check_one_of(("warn", "stop", "undo"), on_harm=on_harm)
        check_not_negative(max_growth=max_growth, min_agreement=min_agreement, sample=sample)
        if max_perplexity and not 1 < max_perplexity < math.inf:
            raise ValueError(f"max_perplexity must be above 1 (or 0 for no bound), got {max_perplexity}")
        if min_agreement > 1:
            raise ValueError(f"min_agreement is a share, at most 1, got {min_agreement}")
        self.on_harm, self.max_perplexity, self.max_growth = on_harm, max_perplexity, max_growth
        self.min_agreement, self.sample = min_agreement, sample
        self.texts = check_every(texts, "texts")
        self._base_perplexity: float | None = None
        self._good = 0  # number of the last edit before the last good look
        self.kept |= {"good": "_good", "base_perplexity": "_base_perplexity"}

    def begin(self, stream: EditStream) -> None:
        """Take what the run goes on from for good."""
        self._good = max(self._good, stream.ledger.history.carried)

    def due(self, stream: EditStream) -> bool:
        """Tell whether it is time to look; the end is looked at as well."""
        return super().due(stream) or (stream.is_at_end and stream.edits_made > self._seen)

    def go_on(self, stream: EditStream) -> None:
        """Look at the model."""
        stream.session.repeat_between_steps()  # what was taken out by hand is not to be found harmful again
        self.look(stream)

    def look(self, stream: EditStream) -> None:
        """Look at the model, and act if it is past a bound.

        Raises:
            HarmError: If it is, and the policy is to stop or nothing helps.
        """
        stream.status("looking for harm")
        health = self.measure(stream)
        while breach := stream.ranks.agree(self.breach(health)):
            try:
                offender = self._find(stream)
                title = _title(stream, offender)
            except ArgumentError as error:  # not every editor takes edits out, or not these
                offender, title = None, f"Which edit did it cannot be found out: {error}."
            self.history.append({"edits": stream.edit_number, "edit": offender, "breach": breach, "did": self.on_harm})
            if self.on_harm == "warn":
                log.warning("harm: %s. %s", breach, title)
                break
            if self.on_harm == "stop" or offender is None:
                raise HarmError(f"{breach}. {title}{_advice(stream, offender)}")
            log.warning("harm: %s. %s It is taken back", breach, title)
            stream.session.undo([offender], f"taken back: {breach}", origin="guard")
            health = self.measure(stream)
        self._good = stream.ledger.made
        stream.log_at_edit({f"guard/{name}": value for name, value in vars(health).items() if value is not None})

    def measure(self, stream: EditStream, adapter: ModelAdapter | None = None) -> Health:
        """Measure the stream's model as it is, or a view of it."""
        ledger = stream.ledger
        adapter = adapter or ledger.adapter
        texts = perplexity_texts()[: self.texts]
        if self._base_perplexity is None:
            self._base_perplexity = stream.measure_texts(texts, ledger.original())["corpus"]
        perplexity = stream.measure_texts(texts, adapter)["corpus"] / self._base_perplexity
        sizes = [
            float(for_algebra(adapter.weight(layer)).abs().mean() / for_algebra(ledger.base[name]).abs().mean())
            for layer, name in ledger.names.items()
        ]
        growth = max(sizes, default=1.0) - 1  # an editor may write no layer
        return Health(perplexity if math.isfinite(perplexity) else math.inf, growth, self._agreement(stream, adapter))

    def _agreement(self, stream: EditStream, adapter: Any) -> float | None:
        base = stream.results["base"]
        sample = [r for r in stream.stream_requests() if r.neighborhood and r.id in base][: self.sample]
        if not sample or not self.min_agreement:
            return None
        results, _ = stream.measure(sample, adapter, with_perplexity=False)
        agreement = summarise(results.values(), base)["locality"]["agreement"]
        return None if agreement is None else float(agreement)

    def breach(self, health: Health) -> str | None:
        """Return which bound is passed, for people; ``None`` if all is well."""
        if not math.isfinite(health.perplexity):
            return "the model's logits are not finite"
        if self.max_perplexity and health.perplexity > self.max_perplexity:
            return (
                f"perplexity is {health.perplexity:.3g} times that of the unedited model (bound {self.max_perplexity})"
            )
        if self.max_growth and not health.growth <= self.max_growth:
            return f"mean |W| of an edited layer has grown by {health.growth:.1%} (bound {self.max_growth:.0%})"
        if health.agreement is not None and health.agreement < self.min_agreement:
            return f"only {health.agreement:.0%} of the neighbours keep their answers (bound {self.min_agreement:.0%})"
        return None

    def _find(self, stream: EditStream) -> int | None:
        """Return the number of the edit that passed the bound; ``None`` if no edit since the last good look did."""
        recent = [entry.number for entry in stream.ledger.entries if entry.number > self._good]
        if not recent or self._bad_without(stream, recent):
            return None
        low, high = 0, len(recent)  # good with the first `low` of them, bad with the first `high`
        while high - low > 1:
            middle = (low + high) // 2
            if self._bad_without(stream, recent[middle:]):
                high = middle
            else:
                low = middle
        return recent[high - 1]

    def _bad_without(self, stream: EditStream, numbers: Sequence[int]) -> bool:
        proposal = stream.editor.retract(stream.ledger.facts_of(numbers))
        view = stream.session.preview(proposal)
        return bool(stream.ranks.agree(self.breach(self.measure(stream, view)) is not None))


def _title(stream: EditStream, number: int | None) -> str:
    if number is None:
        return "No single edit since the last look did it: the edits before have worn the model out."
    entry = stream.ledger.history.entry(number)
    return f"Edit {number} ({entry.prompt!r} -> {entry.target_new!r}) did it."


def _advice(stream: EditStream, number: int | None) -> str:
    if number is None or stream.journal is None:
        return ""
    folder = Path(stream.journal).parent.parent
    return (
        f" Take it out with lit-edit undo --run {folder} --edit {number}, and go on with "
        f"lit-edit fit --config {folder}/config.yaml --resume auto"
    )
