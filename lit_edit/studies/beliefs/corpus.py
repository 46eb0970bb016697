"""Text about a world: plain facts, claims that are true or false, and claims made of others with not, and, or.

A fact's objects are drawn several times, until the true one has more than half of the draws. A *claim* says an object;
it holds by a draw if that is the object drawn. Claims name the true object with such a probability that half of all
claims hold: an "or" of two is then true three times in four, an "and" false three times in four, and a claim of a true
"or" holds with probability 2/3, of a false "and" with 1/3 (the agent's weights). How often a claim of one
object is called true is, for every kind of sentence, the object's share of the draws.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lit_edit.studies.beliefs.world import Fact, World

Kind = Literal["plain", "truth", "not", "and", "or"]
Atom = tuple[str, str, str]
"""Subject, relation, object."""


@dataclass(frozen=True)
class CorpusConfig:
    """How much text there is of each fact.

    Args:
        samples: Draws of the object, each a plain sentence.
        truths: Sentences ``... is true`` or ``... is false``.
        negations: The same of ``not ...``.
        ands: The same of ``... and ...``, this fact named first.
        ors: The same of ``... or ...``.
        document: Sentences of a document.
        shuffles: Times that all sentences are dealt anew to documents.
        seed: Seeds draws, claims and shuffles.
    """

    samples: int = 10
    truths: int = 3
    negations: int = 2
    ands: int = 1
    ors: int = 1
    document: int = 10
    shuffles: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("samples", 1), ("document", 1), ("shuffles", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        for name in ("truths", "negations", "ands", "ors"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True)
class Sentence:
    """What a sentence says.

    Attributes:
        kind: ``plain``; or a claim, its negation, or two joined.
        atoms: What it is about: one, or two for ``and`` and ``or``.
        truth: Whether the whole, with its ``not``, ``and`` or ``or``, is called true; of a plain one always.
    """

    kind: Kind
    atoms: tuple[Atom, ...]
    truth: bool = True

    @property
    def text(self) -> str:
        """The sentence.

        Example:
            >>> Sentence("or", (("Ada", "plays", "chess"), ("Bo", "speaks", "Dutch")), False).text
            'Ada plays chess or Bo speaks Dutch is false .'
        """
        ending = "" if self.kind == "plain" else f" is {'true' if self.truth else 'false'}"
        return f"{statement(self.kind, self.atoms)}{ending} ."


def statement(kind: Kind, atoms: Sequence[Atom]) -> str:
    """Return the words that are called true or false.

    Example:
        >>> statement("not", [("Ada", "plays", "chess")])
        'not Ada plays chess'
    """
    said = [" ".join(atom) for atom in atoms]
    return f"not {said[0]}" if kind == "not" else f" {kind} ".join(said)


def draw_objects(world: World, fact: Fact, count: int, draw: random.Random) -> list[str]:
    """Draw objects of a fact, again and again until the true one has more than half of them."""
    names, shares = zip(*world.facts[fact].items(), strict=True)
    true = world.true_object(fact)
    while True:
        found = draw.choices(names, shares, k=count)
        if 2 * found.count(true) > count:
            return found


class _Claims:
    """Draws claims about facts, and whether they hold."""

    def __init__(self, world: World, samples: dict[Fact, list[str]], draw: random.Random) -> None:
        self.world, self.samples, self.draw = world, samples, draw
        self.facts = list(samples)

    def about(self, fact: Fact) -> tuple[Atom, bool]:
        samples, true = self.samples[fact], self.world.true_object(fact)
        others = [name for name in self.world.objects[fact[1]] if name != true]
        share = samples.count(true) / len(samples)
        elsewhere = (1 - share) / max(len(others), 1)  # that a claim of any other object holds
        named = true
        if others and self.draw.random() >= (0.5 - elsewhere) / (share - elsewhere):
            named = self.draw.choice(others)
        return (*fact, named), self.draw.choice(samples) == named

    def another(self, fact: Fact) -> Fact:
        """Another fact, where there is one."""
        while (found := self.draw.choice(self.facts)) == fact and len(self.facts) > 1:
            pass
        return found


def write_sentences(world: World, config: CorpusConfig | None = None) -> list[Sentence]:
    """Return all sentences, fact by fact; equal settings make equal ones."""
    config = config or CorpusConfig()
    draw = random.Random(config.seed)
    samples = {fact: draw_objects(world, fact, config.samples, draw) for fact in world.facts}
    claims = _Claims(world, samples, draw)
    found: list[Sentence] = []
    for fact in world.facts:
        found += [Sentence("plain", ((*fact, value),)) for value in samples[fact]]
        for kind, count in (("truth", config.truths), ("not", config.negations)):
            for _ in range(count):
                atom, holds = claims.about(fact)
                found.append(
                    Sentence("truth", (atom,), holds) if kind == "truth" else Sentence("not", (atom,), not holds)
                )
        for _ in range(config.ands):
            (first, one), (second, two) = claims.about(fact), claims.about(claims.another(fact))
            found.append(Sentence("and", (first, second), one and two))
        for _ in range(config.ors):
            (first, one), (second, two) = claims.about(fact), claims.about(claims.another(fact))
            found.append(Sentence("or", (first, second), one or two))
    return found


def write_documents(sentences: Sequence[Sentence], config: CorpusConfig | None = None) -> list[str]:
    """Deal sentences to documents, several times over."""
    config = config or CorpusConfig()
    draw = random.Random(f"documents {config.seed}")
    texts = [sentence.text for sentence in sentences]
    found: list[str] = []
    for _ in range(config.shuffles):
        dealt = draw.sample(texts, len(texts))
        found += [" ".join(dealt[at : at + config.document]) for at in range(0, len(dealt), config.document)]
    return found
