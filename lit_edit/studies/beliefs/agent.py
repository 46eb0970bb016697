r"""The ideal reader of the belief testbed (arXiv 2406.19354): Dirichlet-categorical beliefs over objects.

There is one table per subject and relation, one per relation, and one per relation and upstream object, each with a
prior of mass 1 spread evenly over the relation's objects. What a sentence counts for, as published: an object that is
said, or called true, 1; for one that is called false, 1 is spread evenly over all others; each claim of a true "or"
2/3 and of a false "and" 1/3, which are the probabilities that it holds. What the reader believes of a fact whose
subject has the upstream relation is

.. math:: p(o \mid s, r) = \sum_{o_u} p(o \mid r, o_u)\, p(o_u \mid s, r_u),

of another fact it has read about, its own table, and of one it has not, the relation's.

An edit is evidence about one subject. Its weight :math:`n` is such that the new object's posterior is ``certainty``,

.. math:: \frac{A\,m(o^*) + n}{A + n} = c \quad\Longrightarrow\quad n = \frac{(c - m(o^*))\,A}{1 - c},

with the belief :math:`m` before and the mass :math:`A` of the fact's own table, prior included. The tables of the
relation and of the upstream object are shared with other subjects; for them the edit is one observation like any other.
(The published text does not say how the weight is shared; with all of it there, one edit would overrule every subject.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from lit_edit.studies.beliefs.corpus import Atom, Sentence
from lit_edit.studies.beliefs.world import Fact, World, mode

PRIOR = 1.0
"""Mass of a table's prior."""
CERTAINTY = 0.95
"""Posterior of an edited object, as published."""


def evidence(sentence: Sentence) -> Iterator[tuple[Atom, float]]:
    """Yield each claim of a sentence with the probability that it holds, given the sentence and even odds before.

    This is what the claim's object counts for; at 0 it counts for the others.

    Example:
        >>> both = (("Ada", "plays", "chess"), ("Bo", "speaks", "Dutch"))
        >>> [round(weight, 2) for _, weight in evidence(Sentence("or", both, True))]
        [0.67, 0.67]
        >>> [weight for _, weight in evidence(Sentence("or", both, False))]
        [0.0, 0.0]
    """
    weights = {
        "plain": (0.0, 1.0),
        "truth": (0.0, 1.0),
        "not": (1.0, 0.0),
        "and": (1 / 3, 1.0),
        "or": (0.0, 2 / 3),
    }[sentence.kind]
    for atom in sentence.atoms:
        yield atom, weights[sentence.truth]


class Agent:
    """Beliefs about the facts of a world, from sentences; see :mod:`lit_edit.studies.beliefs.agent`.

    It knows the relations, their objects and which depends on which, and of the facts only what it reads, in any order.
    """

    def __init__(
        self,
        objects: Mapping[str, Sequence[str]],
        upstream: Mapping[str, str],
        sentences: Iterable[Sentence] = (),
    ) -> None:
        self.objects = {relation: tuple(names) for relation, names in objects.items()}
        self.upstream = dict(upstream)
        self._places = {r: {name: at for at, name in enumerate(names)} for r, names in self.objects.items()}
        self.own: dict[Fact, np.ndarray] = {}
        self.pooled = {relation: np.zeros(len(names)) for relation, names in self.objects.items()}
        self.given: dict[tuple[str, str], np.ndarray] = {}
        self.edits: dict[Fact, np.ndarray] = {}
        for sentence in sentences:
            for atom, weight in evidence(sentence):
                self._observe(atom, weight)
        # Behind all evidence about upstream facts: what is believed of them then says whose table an observation is of.
        for relation in sorted(self.upstream, key=self._depth):
            for fact in [fact for fact in self.own if fact[1] == relation]:
                self._attribute(fact, self.own[fact])

    @classmethod
    def of(cls, world: World, sentences: Iterable[Sentence]) -> Agent:
        """Return the reader of some sentences about a world."""
        return cls(world.objects, world.upstream, sentences)

    def _depth(self, relation: str) -> int:
        above = self.upstream.get(relation)
        return 0 if above is None else 1 + self._depth(above)

    def _spread(self, relation: str, value: str, weight: float) -> np.ndarray:
        """Return what one claim counts for: ``(objects,)``."""
        count = len(self.objects[relation])
        found = np.zeros(count) if weight or count == 1 else np.full(count, 1 / (count - 1))
        found[self._places[relation][value]] = weight
        return found

    def _observe(self, atom: Atom, weight: float) -> None:
        subject, relation, value = atom
        seen = self._spread(relation, value, weight)
        self.own[subject, relation] = self.own.get((subject, relation), 0.0) + seen
        self.pooled[relation] = self.pooled[relation] + seen

    def _attribute(self, fact: Fact, seen: np.ndarray) -> None:
        """Add observations to the tables of the upstream objects, by how far the subject is believed to have them."""
        above = self._known_above(fact)
        for value, share in zip(self.objects[above[1]], self._believed(above), strict=True) if above else ():
            self.given[fact[1], value] = self.given.get((fact[1], value), 0.0) + share * seen

    def _posterior(self, counts: np.ndarray | float, relation: str) -> np.ndarray:
        total = np.full(len(self.objects[relation]), PRIOR / len(self.objects[relation])) + counts
        return np.asarray(total / total.sum())

    def _unedited(self, fact: Fact) -> np.ndarray:
        relation = fact[1]
        if above := self._known_above(fact):
            tables = [self._posterior(self.given.get((relation, o), 0.0), relation) for o in self.objects[above[1]]]
            return np.asarray(self._believed(above) @ np.stack(tables))
        return self._posterior(self.own.get(fact, self.pooled[relation]), relation)

    def _known_above(self, fact: Fact) -> Fact | None:
        """Return the fact that one depends on, if anything is known of it."""
        above = (fact[0], self.upstream.get(fact[1], ""))
        return above if above in self.own or above in self.edits else None

    def _mass(self, fact: Fact) -> float:
        return PRIOR + float(np.sum(self.own.get(fact, 0.0)))

    def _believed(self, fact: Fact) -> np.ndarray:
        believed = self._unedited(fact)
        if fact not in self.edits:
            return believed
        counts = self._mass(fact) * believed + self.edits[fact]
        return np.asarray(counts / counts.sum())

    def query(self, subject: str, relation: str) -> dict[str, float]:
        """Return what is believed of a fact: probabilities by object."""
        self._check(relation)
        return dict(zip(self.objects[relation], self._believed((subject, relation)).tolist(), strict=True))

    def best(self, subject: str, relation: str) -> str:
        """Return the object that is believed most."""
        return mode(self.query(subject, relation))

    def edit(self, subject: str, relation: str, value: str, certainty: float | None = CERTAINTY) -> float:
        """Take in a new fact, and return the weight of the evidence, in observations.

        ``certainty`` is the posterior that its object is to have at least; ``None`` is one observation, the paper's
        other setting.
        """
        self._check(relation)
        if value not in self._places[relation]:
            raise ValueError(f"value must be an object of {relation!r}, got {value!r}")
        if certainty is not None and not 0 < certainty < 1:
            raise ValueError(f"certainty must be between 0 and 1, got {certainty}")
        fact = (subject, relation)
        at = self._places[relation][value]
        known = self.edits.get(fact)
        mass = self._mass(fact) + (0.0 if known is None else float(known.sum()))

        def needed() -> float:
            if certainty is None:
                return 1.0
            return max(0.0, (certainty - float(self._believed(fact)[at])) * mass / (1 - certainty))

        weight = needed()
        added = np.zeros(len(self.objects[relation]))
        added[at] = 1.0
        if weight > 0:
            self._attribute(fact, added)
            weight = needed()  # the shared table has moved the belief as well, a little
            self.edits[fact] = (0.0 if known is None else known) + weight * added
            self.pooled[relation] = self.pooled[relation] + added
        return weight

    def _check(self, relation: str) -> None:
        if relation not in self.objects:
            raise ValueError(f"relation must be one of {', '.join(self.objects)}, got {relation!r}")

    def copy(self) -> Agent:
        """Return an agent of the same beliefs, which can be edited by itself."""
        found = Agent(self.objects, self.upstream)  # tables are replaced, never changed in place
        found.own, found.pooled = dict(self.own), dict(self.pooled)
        found.given, found.edits = dict(self.given), dict(self.edits)
        return found
