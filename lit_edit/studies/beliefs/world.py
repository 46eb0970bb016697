r"""The world of the belief testbed (arXiv 2406.19354): facts whose objects are drawn from known distributions.

A relation has at most one upstream relation. Where a subject has both, the object depends on the upstream one,

.. math:: o \sim p(o \mid r, o_u), \qquad o_u = \text{the subject's true upstream object},

else it comes from two points: the true object and one distractor. Every distribution is sharpened until its mode, the
true object, has at least :data:`LEAST_MODE`. Objects along a chain of dependencies therefore follow from its head.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path

from lit_edit.data.files import read_text
from lit_edit.data.request import DataError, find_fault
from lit_edit.errors import ArgumentError, shorten
from lit_edit.files.paths import expand

log = logging.getLogger(__name__)

LEAST_MODE = 0.6
"""Least probability of a true object, as published."""

Fact = tuple[str, str]
"""Subject and relation."""
Distribution = Mapping[str, float]
"""Probabilities by object; they sum to one."""

PAIRS = (
    ("was born in", "speaks"),
    ("works for", "commutes to"),
    ("studied at", "votes for"),
    ("plays", "trains with"),
    ("collects", "trades at"),
)
"""Verb phrases of the generator: upstream, dependent."""
RESERVED = frozenset({"is", "true", "false", "and", "or", "not", "."})
"""Words of the sentences: an entity or relation that holds one of them apart from others could be misread."""


@dataclass(frozen=True)
class WorldConfig:
    """What a generated world is made of."""

    subjects: int = 200
    pairs: int = 5  # of relations, the second of each depending on the first
    whole: int = 2  # pairs of which a subject has both relations
    single: int = 1  # further pairs of which a subject has one relation
    upstream_objects: int = 10  # of each upstream relation
    dependent_objects: int = 8  # of each dependent relation
    seed: int = 0  # of names, objects and distributions

    def __post_init__(self) -> None:
        for name, low, high in (
            ("subjects", 1, 100_000),
            ("pairs", 1, len(PAIRS)),
            ("whole", 0, self.pairs),
            ("single", 0, self.pairs - self.whole),
            ("upstream_objects", 2, 1000),
            ("dependent_objects", 2, 1000),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be from {low} to {high}, got {getattr(self, name)}")
        if self.whole + self.single < 1:
            raise ValueError("whole and single are both 0: subjects would have no facts")


@dataclass(frozen=True)
class World:
    """Relations and facts; dependencies in a circle, or other objects than the relation's, are refused."""

    objects: Mapping[str, tuple[str, ...]]  # by relation, all objects it can have, sorted
    upstream: Mapping[str, str]  # by relation, the one it depends on; the others are missing
    facts: Mapping[Fact, Distribution]  # by subject and relation, the distribution of the object

    def __post_init__(self) -> None:
        for relation in self.objects:
            self.chain(relation)
        for fact, distribution in self.facts.items():
            if abs(sum(distribution.values()) - 1) > 1e-9 or set(distribution) - set(self.objects[fact[1]]):
                raise ValueError(f"the distribution of {fact} is none over the objects of its relation")

    def chain(self, relation: str) -> list[str]:
        """Return a relation and those it depends on, nearest first."""
        found = [relation]
        while (above := self.upstream.get(found[-1])) is not None:
            if above in found:
                raise ValueError(f"relations depend on each other in a circle: {', '.join(found)}")
            found.append(above)
        return found

    def true_object(self, fact: Fact) -> str:
        """Return the likeliest object."""
        return mode(self.facts[fact])

    def dependents(self, fact: Fact) -> list[Fact]:
        """Return the subject's facts that depend on this one directly."""
        subject, relation = fact
        return [
            (subject, below)
            for below, above in self.upstream.items()
            if above == relation and (subject, below) in self.facts
        ]


def mode(distribution: Distribution) -> str:
    """Return the likeliest object, the first by name among equals.

    Example:
        >>> mode({"b": 0.4, "a": 0.4, "c": 0.2})
        'a'
    """
    return min(distribution, key=lambda name: (-distribution[name], name))


def sharpen(weights: Mapping[str, float], least: float = LEAST_MODE) -> dict[str, float]:
    """Return weights as a distribution whose mode has at least ``least``.

    Where it has less, as much of the point mass at the mode is mixed in as is needed; what is left keeps its ratios. (A
    power of the distribution, the other usual way, cannot part equals.)

    Example:
        >>> sharpen({"a": 2, "b": 1, "c": 1})
        {'a': 0.6, 'b': 0.2, 'c': 0.2}
    """
    total = sum(weights.values())
    found = {name: weight / total for name, weight in sorted(weights.items()) if weight > 0}
    top = mode(found)
    if found[top] >= least:
        return found
    kept = (1 - least) / (1 - found[top])
    return {name: least if name == top else share * kept for name, share in found.items()}


# ---- from a generator ---------------------------------------------------------------------------------------------


def generate_world(config: WorldConfig | None = None) -> World:
    """Make a world of invented names; equal settings make equal worlds.

    Example:
        >>> world = generate_world(WorldConfig(subjects=4))
        >>> len(world.facts), sorted(world.upstream)[0]
        (20, 'commutes to')
    """
    config = config or WorldConfig()
    draw = random.Random(config.seed)
    names = _invented(draw)
    pairs = PAIRS[: config.pairs]
    objects: dict[str, tuple[str, ...]] = {}
    tables: dict[str, dict[str, dict[str, float]]] = {}
    for above, below in pairs:
        objects[above] = tuple(sorted(islice(names, config.upstream_objects)))
        objects[below] = tuple(sorted(islice(names, config.dependent_objects)))
        tables[below] = {}
        for number, given in enumerate(objects[above]):
            # Different upstream objects imply different ones as far as possible: else an edit would change nothing.
            first = objects[below][number % config.dependent_objects]
            others = draw.sample([name for name in objects[below] if name != first], min(2, len(objects[below]) - 1))
            weights = {first: 1.0, **{name: draw.uniform(0.1, 0.6) for name in others}}
            tables[below][given] = sharpen(weights)
    facts: dict[Fact, Distribution] = {}
    for _ in range(config.subjects):
        subject, chosen = next(names), draw.sample(pairs, config.whole + config.single)
        for number, (above, below) in enumerate(chosen):
            both = number < config.whole
            for relation in (above, below) if both else (draw.choice((above, below)),):
                if both and relation == below:
                    facts[subject, relation] = tables[below][mode(facts[subject, above])]
                else:
                    facts[subject, relation] = _two_points(draw, draw.choice(objects[relation]), objects[relation])
    return World(objects, {below: above for above, below in pairs}, facts)


def _two_points(draw: random.Random, true: str, objects: Sequence[str]) -> dict[str, float]:
    others = [name for name in objects if name != true]
    if not others:
        return {true: 1.0}
    share = draw.uniform(LEAST_MODE, 1.0)
    return {true: share, draw.choice(others): 1 - share}


def _invented(draw: random.Random) -> Iterator[str]:
    """Yield invented words, each once."""
    given = set(RESERVED)
    while True:
        syllables = [draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(3)]
        name = ("".join(syllables) + draw.choice(("", "n", "r", "s", "l"))).capitalize()
        if name not in given:
            given.add(name)
            yield name


# ---- from triples -------------------------------------------------------------------------------------------------


def read_triples(path: str | Path) -> list[tuple[str, str, str]]:
    """Read subject, relation and object with tabs between them, as Wikidata5m has them.

    Wikidata5m itself names everything by ids; put its labels in their place. Each triple is read once.

    Raises:
        DataError: If a line is no triple (names the file and the line), or there are none.
    """
    found: dict[tuple[str, str, str], None] = {}
    for number, line in enumerate(read_text(expand(path)).split("\n"), 1):
        if not line.strip() or line.startswith("#"):
            continue
        cells = tuple(" ".join(cell.split()) for cell in line.rstrip("\r").split("\t"))
        try:
            found.setdefault(_triple(cells))
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from None
    if not found:
        raise DataError(f"{path}: no triples")
    return list(found)


def _triple(cells: tuple[str, ...]) -> tuple[str, str, str]:
    if len(cells) != 3:
        raise DataError(
            f"expected subject, relation and object with tabs between them, got {len(cells)} "
            f"{'column' if len(cells) == 1 else 'columns'}: {shorten(' | '.join(cells))!r}"
        )
    for name, cell in zip(("subject", "relation", "object"), cells, strict=True):
        if not cell:
            raise DataError(f"the {name} is empty")
        if fault := find_fault(cell) or ("{}, which stands for the subject" if "{}" in cell else None):
            raise DataError(f"the {name} holds {fault}")
    subject, relation, value = cells
    for name, cell in (("subject", subject), ("object", value)):
        if cell in RESERVED or (words := RESERVED & set(cell.split())) - {"."}:
            raise DataError(
                f"the {name} {shorten(cell)!r} holds the word {cell if cell in RESERVED else min(words)!r}, which the "
                "sentences are made with: leave the line out or rename it"
            )
    return subject, relation, value


def world_of_triples(
    triples: Iterable[tuple[str, str, str]], relations: int = 10, facts: int = 1000, seed: int = 0
) -> World:
    """Make a world of real triples, after the paper's recipe.

    The relations that most subjects have are kept, and of them the subjects with two or more; relations are paired so
    that as many subjects as possible have both of a pair (an integer program), the one that tells more of the other
    being upstream; the conditional distributions are the sharpened counts.

    Of several objects of a subject and relation the first is true. At most so many relations are kept, and so many
    facts: whole subjects, in order. The seed draws the two-point distributions.
    """
    by_subject: dict[str, dict[str, str]] = {}
    for subject, relation, value in triples:
        by_subject.setdefault(subject, {}).setdefault(relation, value)
    common = Counter(relation for own in by_subject.values() if len(own) > 1 for relation in own)
    kept = sorted(sorted(common), key=lambda relation: -common[relation])[:relations]
    chosen: dict[str, dict[str, str]] = {}
    room = facts
    for subject, own in by_subject.items():
        own = {relation: own[relation] for relation in kept if relation in own}
        if 2 <= len(own) <= room:
            chosen[subject] = own
            room -= len(own)
    if not chosen:
        raise ArgumentError(
            f"the triples hold no subject with two of the {len(kept)} commonest relations within {facts} facts: give "
            "more triples, or take more facts of them (--facts)"
        )
    upstream = pair_relations(list(chosen.values()))
    objects = {
        relation: tuple(sorted({own[relation] for own in chosen.values() if relation in own}))
        for relation in kept
        if any(relation in own for own in chosen.values())
    }
    counts = {below: _counts(chosen.values(), above, below) for below, above in upstream.items()}
    draw = random.Random(seed)
    made: dict[Fact, Distribution] = {}
    for subject, own in chosen.items():
        # Pairs are one deep, so an upstream object is never itself recomputed.
        for relation, value in own.items():
            given = own.get(upstream.get(relation, ""))
            made[subject, relation] = (
                _two_points(draw, value, objects[relation]) if given is None else sharpen(counts[relation][given])
            )
    return World(objects, upstream, made)


def pair_relations(subjects: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Pair relations so that as many subjects (objects by relation) as possible have both of a pair.

    Each is in one pair at most. Returned is, by dependent relation, its upstream one: that from which the other's
    object is guessed right more often.

    Example:
        >>> pair_relations([{"a": "1", "b": "x", "c": "p"}, {"a": "1", "b": "x"}, {"a": "2", "b": "x"}])
        {'b': 'a'}
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    names = sorted({relation for own in subjects for relation in own})
    shared: Counter[tuple[str, str]] = Counter()
    for own in subjects:
        shared.update(combinations(sorted(own), 2))
    edges = sorted(shared)
    if not edges:
        return {}
    # A choice of edges such that no relation is in two of them.
    incidence = np.array([[float(name in edge) for edge in edges] for name in names])
    gains = np.array([-float(shared[edge]) for edge in edges])
    solved = milp(
        gains, constraints=LinearConstraint(incidence, ub=1.0), integrality=np.ones(len(edges)), bounds=Bounds(0, 1)
    )
    if solved.x is None:
        raise RuntimeError(f"the pairing of relations was not solved: {solved.message}")
    found = {}
    for (first, second), share in zip(edges, solved.x, strict=True):
        if share > 0.5:
            right = [
                sum(max(counter.values()) for counter in _counts(subjects, *pair).values())
                for pair in ((first, second), (second, first))
            ]
            above, below = (first, second) if right[0] >= right[1] else (second, first)
            found[below] = above
    return found


def _counts(subjects: Iterable[Mapping[str, str]], above: str, below: str) -> dict[str, Counter[str]]:
    """Return how often subjects with both relations have an object, by upstream object."""
    counts: dict[str, Counter[str]] = {}
    for own in subjects:
        if above in own and below in own:
            counts.setdefault(own[above], Counter())[own[below]] += 1
    return counts
