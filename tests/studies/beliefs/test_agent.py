"""The ideal reader against enumeration written out naively, on a world of ten facts."""

from __future__ import annotations

import random
from itertools import product

import pytest

from lit_edit.studies.beliefs.agent import Agent
from lit_edit.studies.beliefs.corpus import CorpusConfig, Sentence, write_sentences
from lit_edit.studies.beliefs.world import World

OBJECTS = {"city": ("ams", "del", "par"), "land": ("fr", "nl"), "tongue": ("dutch", "french", "frisian")}
UPSTREAM = {"land": "city", "tongue": "land"}  # a chain
TRUE = (
    ("s1", "city", "ams"), ("s1", "land", "nl"), ("s1", "tongue", "dutch"),
    ("s2", "city", "par"), ("s2", "land", "fr"), ("s2", "tongue", "french"),
    ("s3", "city", "del"), ("s3", "land", "nl"),
    ("s4", "land", "nl"), ("s4", "tongue", "dutch"),
)  # fmt: skip


@pytest.fixture(scope="module")
def sentences() -> list[Sentence]:
    facts = {}
    for subject, relation, value in TRUE:
        others = [name for name in OBJECTS[relation] if name != value]
        facts[subject, relation] = {value: 0.9, others[0]: 0.1}
    assert len(facts) == 10
    return write_sentences(
        World(OBJECTS, UPSTREAM, facts), CorpusConfig(samples=10, truths=2, negations=1, ands=1, ors=1)
    )


class Naive:
    """Beliefs by the definition: every table and every sum written out, nothing shared with the library."""

    def __init__(self, sentences: list[Sentence]) -> None:
        self.seen: list[tuple[str, str, dict[str, float]]] = []
        for sentence in sentences:
            for subject, relation, value in sentence.atoms:
                if sentence.kind == "and" and not sentence.truth:
                    counts = {value: 1 / 3}
                elif sentence.kind == "or" and sentence.truth:
                    counts = {value: 2 / 3}
                elif sentence.truth != (sentence.kind == "not"):
                    counts = {value: 1.0}
                else:
                    others = [name for name in OBJECTS[relation] if name != value]
                    counts = {name: 1 / len(others) for name in others}
                self.seen.append((subject, relation, counts))
        self.known: dict[tuple[str, str], dict[str, float]] = {}

    def table(self, relation: str, weight_of: dict[str, float]) -> dict[str, float]:
        """Dirichlet posterior means; ``weight_of``: by subject, how much of its evidence belongs here."""
        counts = {name: 1 / len(OBJECTS[relation]) for name in OBJECTS[relation]}
        for subject, other, seen in self.seen:
            if other == relation:
                for name, count in seen.items():
                    counts[name] += weight_of.get(subject, 0.0) * count
        total = sum(counts.values())
        return {name: count / total for name, count in counts.items()}

    def knows(self, subject: str, relation: str) -> bool:
        return any((s, r) == (subject, relation) for s, r, _ in self.seen)

    def subjects(self) -> set[str]:
        return {subject for subject, _, _ in self.seen}

    def query(self, subject: str, relation: str) -> dict[str, float]:
        """Enumerate all objects along the chain above, as far as the subject has it."""
        chain = [relation]
        while (above := UPSTREAM.get(chain[-1])) is not None and self.knows(subject, above):
            chain.append(above)
        head = chain[-1]
        own = {subject: 1.0} if self.knows(subject, head) else dict.fromkeys(self.subjects(), 1.0)
        found = dict.fromkeys(OBJECTS[relation], 0.0)
        for world in product(*(OBJECTS[r] for r in chain)):
            share = self.table(head, own)[world[-1]]
            for at in range(len(chain) - 2, -1, -1):
                share *= self.given(chain[at], world[at + 1])[world[at]]
            found[world[0]] += share
        return found

    def given(self, relation: str, above: str) -> dict[str, float]:
        if (relation, above) in self.known:
            return self.known[relation, above]
        up = UPSTREAM[relation]
        share = {s: self.query(s, up)[above] for s in self.subjects() if self.knows(s, up)}
        self.known[relation, above] = self.table(relation, share)
        return self.known[relation, above]


def test_beliefs_are_those_of_enumeration(sentences: list[Sentence]) -> None:
    agent, naive = Agent(OBJECTS, UPSTREAM, sentences), Naive(sentences)
    asked = [(s, r) for s, r, _ in TRUE] + [("s3", "tongue"), ("s4", "city"), ("nobody", "land")]
    for subject, relation in asked:
        assert agent.query(subject, relation) == pytest.approx(naive.query(subject, relation), abs=1e-12)
    for subject, relation, value in TRUE:
        assert agent.best(subject, relation) == value


def test_the_order_of_sentences_does_not_matter(sentences: list[Sentence]) -> None:
    turned = random.Random(0).sample(sentences, len(sentences))
    one, two = Agent(OBJECTS, UPSTREAM, sentences), Agent(OBJECTS, UPSTREAM, turned)
    for subject, relation, _ in TRUE:
        assert one.query(subject, relation) == pytest.approx(two.query(subject, relation), abs=1e-12)


def test_an_edit_of_a_head_moves_what_depends_on_it(sentences: list[Sentence]) -> None:
    before = Agent(OBJECTS, UPSTREAM, sentences)
    after = before.copy()
    weight = after.edit("s1", "city", "par")
    naive = Naive(sentences)
    mass = 1 + sum(sum(seen.values()) for s, r, seen in naive.seen if (s, r) == ("s1", "city"))
    share = naive.query("s1", "city")["par"]
    assert weight == pytest.approx((0.95 - share) * mass / 0.05)
    edited = after.query("s1", "city")
    assert edited["par"] == pytest.approx(0.95)
    kept = naive.query("s1", "city")
    assert edited["ams"] / edited["del"] == pytest.approx(kept["ams"] / kept["del"])  # the others keep their ratio
    # the dependent fact: the tables of the upstream objects, mixed anew
    expected = {
        name: sum(edited[city] * naive.given("land", city)[name] for city in OBJECTS["city"])
        for name in OBJECTS["land"]
    }
    assert after.query("s1", "land") == pytest.approx(expected, abs=1e-12)
    assert (before.best("s1", "land"), after.best("s1", "land")) == ("nl", "fr")
    assert (before.best("s1", "tongue"), after.best("s1", "tongue")) == ("dutch", "french")
    for subject, relation, _ in TRUE[3:]:
        assert after.query(subject, relation) == before.query(subject, relation)
    assert before.query("s1", "city") == pytest.approx(kept, abs=1e-12)  # the copy was edited alone


def test_edits_of_dependent_repeated_and_new_facts(sentences: list[Sentence]) -> None:
    agent = Agent(OBJECTS, UPSTREAM, sentences)
    agent.edit("s1", "land", "fr")
    assert agent.query("s1", "land")["fr"] == pytest.approx(0.95)
    assert agent.best("s1", "city") == "ams"  # nothing runs upward
    assert agent.best("s3", "land") == "nl"  # one observation among many
    agent.edit("s1", "land", "nl")
    assert agent.query("s1", "land")["nl"] == pytest.approx(0.95)
    assert agent.edit("s1", "land", "nl") == 0  # it is so already
    agent.edit("s4", "city", "par")  # of which nothing was read: what was read of the land now depends on it
    assert 0.95 <= agent.query("s4", "city")["par"] < 0.96  # the table of all cities has moved a little, too
    assert agent.best("s4", "land") == "fr"


def test_one_observation_is_the_other_published_weight() -> None:
    agent = Agent({"r": ("a", "b")}, {}, [Sentence("plain", (("s", "r", "a"),))] * 3)
    assert agent.edit("s", "r", "b", certainty=None) == 1.0
    assert agent.query("s", "r") == pytest.approx({"a": 3.5 / 5, "b": 1.5 / 5})


def test_what_cannot_be_asked_is_refused() -> None:
    agent = Agent({"r": ("a", "b")}, {})
    assert agent.query("s", "r") == {"a": 0.5, "b": 0.5}
    with pytest.raises(ValueError, match="relation must be one of r, got 'q'"):
        agent.query("s", "q")
    with pytest.raises(ValueError, match="value must be an object of 'r', got 'c'"):
        agent.edit("s", "r", "c")
    with pytest.raises(ValueError, match="certainty must be between"):
        agent.edit("s", "r", "a", certainty=1.0)
