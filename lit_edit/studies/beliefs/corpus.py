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

from lit_edit.errors import check_least, check_not_negative
from lit_edit.studies.beliefs.world import Fact, World

Kind = Literal["plain", "truth", "not", "and", "or"]
Atom = tuple[str, str, str]
"""Subject, relation, object."""


@dataclass(frozen=True)
class CorpusConfig:
    """How much text there is of each fact."""

    samples: int = 10  # draws of the object, each a plain sentence
    truths: int = 3  # sentences "... is true" or "... is false"
    negations: int = 2  # the same of "not ..."
    ands: int = 1  # the same of "... and ...", this fact named first
    ors: int = 1  # the same of "... or ..."
    document: int = 10  # sentences of a document
    shuffles: int = 5  # times that all sentences are dealt anew to documents
    seed: int = 0  # of draws, claims and shuffles

    def __post_init__(self) -> None:
        check_least(1, samples=self.samples, document=self.document, shuffles=self.shuffles)
        check_not_negative(truths=self.truths, negations=self.negations, ands=self.ands, ors=self.ors)


@dataclass(frozen=True)
class Sentence:
    """What a sentence says."""

    kind: Kind
    atoms: tuple[Atom, ...]  # that it is about: one, or two for "and" and "or"
    truth: bool = True  # whether the whole, with its "not", "and" or "or", is called true; of a plain one always

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
        single: tuple[tuple[Kind, int], ...] = (("truth", config.truths), ("not", config.negations))
        for kind, count in single:
            for _ in range(count):
                atom, holds = claims.about(fact)
                found.append(Sentence(kind, (atom,), holds == (kind == "truth")))
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
