"""The testbed's text: how often what is said, and in which documents."""

from __future__ import annotations

from collections import Counter

import pytest

from lit_edit.studies.beliefs.corpus import CorpusConfig, Sentence, write_documents, write_sentences
from lit_edit.studies.beliefs.world import World, WorldConfig, generate_world


def test_sentences_are_as_frequent_as_asked_for() -> None:
    world = generate_world(WorldConfig(subjects=60))
    sentences = write_sentences(world, CorpusConfig(samples=9, truths=6, negations=4, ands=6, ors=6))
    counts = {
        kind: (sum(one.truth for one in sentences if one.kind == kind), total)
        for kind, total in Counter(one.kind for one in sentences).items()
    }
    facts = len(world.facts)
    assert {kind: total for kind, (_, total) in counts.items()} == {
        "plain": 9 * facts, "truth": 6 * facts, "not": 4 * facts, "and": 6 * facts, "or": 6 * facts
    }  # fmt: skip
    for kind, expected in (("truth", 0.5), ("not", 0.5), ("and", 0.25), ("or", 0.75)):
        true, total = counts[kind]
        assert true / total == pytest.approx(expected, abs=4 * (expected * (1 - expected) / total) ** 0.5), kind
    said: dict[tuple[str, str], Counter[str]] = {}
    for sentence in sentences:
        if sentence.kind == "plain":
            subject, relation, value = sentence.atoms[0]
            said.setdefault((subject, relation), Counter())[value] += 1
    for fact, counter in said.items():
        assert counter[world.true_object(fact)] >= 5  # of nine
        assert set(counter) <= set(world.facts[fact])


def test_claims_are_as_noisy_as_the_draws() -> None:
    """A claim of the true object is called true as often as the object is drawn; so it is behind "not", turned."""
    world = World({"r": tuple("abcd")}, {}, {(f"s{n}", "r"): {"a": 0.75, "b": 0.25} for n in range(400)})
    sentences = write_sentences(world, CorpusConfig(samples=10, truths=10, negations=10))
    drawn = [s.atoms[0][2] == "a" for s in sentences if s.kind == "plain"]
    share = sum(drawn) / len(drawn)
    assert 0.7 < share < 0.85  # rejection of draws with five or fewer moves it up
    claimed = [s.truth for s in sentences if s.kind == "truth" and s.atoms[0][2] == "a"]
    denied = [s.truth for s in sentences if s.kind == "not" and s.atoms[0][2] == "a"]
    assert sum(claimed) / len(claimed) == pytest.approx(share, abs=0.03)
    assert sum(denied) / len(denied) == pytest.approx(1 - share, abs=0.03)


def test_a_lone_fact_and_a_lone_object_can_be_written_about() -> None:
    world = World({"r": ("a",)}, {}, {("s", "r"): {"a": 1.0}})
    sentences = write_sentences(world, CorpusConfig())
    assert {atom for sentence in sentences for atom in sentence.atoms} == {("s", "r", "a")}
    assert all(sentence.truth for sentence in sentences if sentence.kind != "not")


def test_documents_hold_every_sentence_once_per_shuffle() -> None:
    world, config = generate_world(WorldConfig(subjects=3)), CorpusConfig(document=7, shuffles=2)
    sentences = write_sentences(world, config)
    assert sentences == write_sentences(world, config)
    documents = write_documents(sentences, config)
    assert documents == write_documents(sentences, config)
    assert documents != write_documents(sentences, CorpusConfig(document=7, shuffles=2, seed=1))
    assert len(documents) == 2 * -(-len(sentences) // 7)
    expected = Counter(sentence.text for sentence in sentences)
    half = len(documents) // 2
    for part in (documents[:half], documents[half:]):
        assert Counter(f"{text} ." for document in part for text in f"{document} ".split(" . ")[:-1]) == expected
    assert documents[:half] != documents[half:]


def test_texts() -> None:
    a, b = ("Ada", "was born in", "New York"), ("Bo", "speaks", "Dutch")
    assert Sentence("plain", (a,)).text == "Ada was born in New York ."
    assert Sentence("truth", (a,), False).text == "Ada was born in New York is false ."
    assert Sentence("not", (b,), True).text == "not Bo speaks Dutch is true ."
    assert Sentence("and", (a, b)).text == "Ada was born in New York and Bo speaks Dutch is true ."
