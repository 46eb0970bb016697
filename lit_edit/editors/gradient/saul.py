r"""SAUL: fine-tuning on the new fact in a sentence of other facts (2410.02433, Findings of EMNLP 2024).

Fine-tuned on a few target tokens alone, a model begins to repeat them. SAUL joins the sentence of the edit with a
random true sentence, and trains on the likelihood of the whole:

.. math:: L = -\frac{1}{T} \sum_{t=2}^{T} \log p(w_t \mid w_{<t}), \qquad
          w = [\,\text{prompt target}. \; \text{random fact}\,],

so that what comes after the target stays text (generation regularisation), and facts that have nothing to do with the
edit are said again (random fact augmentation). Nothing is located and no covariance is needed.

What the random facts are decides what is protected: they must not be about what is measured as locality. By nature the
method protects nothing else, and an edit costs a few sentences instead of a few tokens. No code was published; layers,
rate and steps are this library's.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

from lit_edit.data.files import read_text
from lit_edit.data.request import DataError, EditRequest, find_fault
from lit_edit.data.sources import builtin_text
from lit_edit.editors.base import EditorInfo
from lit_edit.editors.gradient.engine import GradientEditor
from lit_edit.editors.gradient.ft import FT
from lit_edit.editors.lessons import Lesson
from lit_edit.errors import ArgumentError, check_least, shorten
from lit_edit.files.paths import expand
from lit_edit.text.tokens import encode


def join_sentences(sentence: str, others: Sequence[str]) -> str:
    """Return sentences one behind the other, the first with a full stop.

    Example:
        >>> join_sentences("The capital of Italy is Vienna", ["Oak trees grow from acorns."])
        'The capital of Italy is Vienna. Oak trees grow from acorns.'
    """
    sentence = sentence.strip()
    return " ".join([sentence if sentence.endswith((".", "!", "?")) else f"{sentence}.", *others])


def draw_facts(facts: Sequence[str], subject: str, count: int, seed: int, key: str) -> list[str]:
    """Draw sentences, without repetition, that do not name a subject; fewer if there are not so many.

    They are the same for the same seed and key, which tells edits apart, whatever was drawn before.

    Example:
        >>> draw_facts(["Oaks are trees.", "Italy is warm."], "Italy", 2, 0, "1")
        ['Oaks are trees.']
    """
    free = [fact for fact in facts if subject.strip().casefold() not in fact.casefold()]
    return random.Random(f"{seed}\x1f{key}").sample(free, min(count, len(free)))


class SAUL(GradientEditor):
    """Fine-tune on the edit joined with random true sentences; see :mod:`lit_edit.editors.gradient.saul`.

    Args:
        facts: True sentences, or a text file with one a line; by default forty that ship with the package.
        joined: How many are joined with the edit's sentence.
        augmented: How many more are trained on by themselves, as further rows of the edit.
        seed: Seeds the choice.
        kwargs: As for :class:`GradientEditor`. Random sentences seldom let the loss reach ``loss_threshold``.
    """

    about: ClassVar[EditorInfo] = replace(
        FT.about,
        title="SAUL",
        paper="Better Call SAUL, 2410.02433",
        cost="steps x passes of the layers above the edited one, on whole sentences",
        lacks="regard for other facts than the random ones",
    )
    published = FT.published
    depends_on = "joined augmented seed"

    def __init__(
        self,
        facts: list[str] | str | None = None,
        joined: int = 1,
        augmented: int = 0,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_least(0, joined=joined, augmented=augmented)
        self.random_facts = _read(facts)
        if len(self.random_facts) < joined + augmented:
            raise ArgumentError(f"joined + augmented asks for {joined + augmented} facts of {len(self.random_facts)}")
        self.joined, self.augmented, self.seed = joined, augmented, seed

    def lessons(self, request: EditRequest) -> list[Lesson]:
        """Return the edit's sentence with what it is joined with, and the sentences beside it."""
        key = f"{request.id}\x1f{request.text}\x1f{request.target_new}"
        drawn = draw_facts(self.random_facts, request.subject, self.joined + self.augmented, self.seed, key)
        sentence = f"{request.text.rstrip()} {request.target_new.strip()}"
        texts = [join_sentences(sentence, drawn[: self.joined]), *drawn[self.joined :]]
        rows = [encode(self.tokenizer, text) for text in texts]
        return [Lesson(row[:-1], tuple(range(len(row) - 1)), row[1:]) for row in rows if len(row) > 1]

    def facts(self, before: float, after: float) -> dict[str, float]:
        """Return the losses: they are of whole sentences, and say nothing of the target's probability."""
        return {"loss_before": before, "loss": after}

    def settings(self) -> dict[str, Any]:
        """Return all settings that a result depends on."""
        return {**super().settings(), "facts": sha256("\n".join(self.random_facts).encode()).hexdigest()[:16]}


def _read(facts: list[str] | str | None) -> tuple[str, ...]:
    """Return the sentences of a list, a file, or the package; refuse none at all, and what cannot be used."""
    if isinstance(facts, str):
        facts = read_text(Path(expand(facts))).splitlines()
    elif facts is None:
        facts = builtin_text("true_sentences.txt").splitlines()
    sentences = tuple(fact.strip() for fact in facts if fact.strip())
    if not sentences:
        raise DataError("facts holds no sentence")
    for sentence in sentences:
        if fault := find_fault(sentence):
            raise DataError(f"the fact {shorten(sentence)!r} holds {fault}")
    return sentences
