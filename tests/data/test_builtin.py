"""What the built-in facts promise."""

from __future__ import annotations

from collections import Counter

import pytest

from lit_edit.data.request import EditRequest, find_subject
from lit_edit.data.sources import builtin_text, load_requests

FACTS = load_requests("builtin")[0]
each_fact = pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.id)


def names(text: str, subject: str) -> bool:
    start = find_subject(text, subject)
    return start is not None


def test_there_are_enough_edits_over_enough_relations() -> None:
    assert len(FACTS) >= 48
    relations = Counter(fact.relation for fact in FACTS)
    assert "" not in relations
    assert len(relations) >= 12


def test_no_fact_is_edited_twice() -> None:
    assert len({fact.id for fact in FACTS}) == len(FACTS)
    assert len({(fact.prompt, fact.subject) for fact in FACTS}) == len(FACTS)


@each_fact
def test_every_edit_has_probes_of_every_kind(fact: EditRequest) -> None:
    assert len(fact.paraphrases) == len(set(fact.paraphrases)) == 2
    assert len({probe.prompt for probe in fact.neighborhood}) >= 4
    assert fact.generation
    assert fact.text not in fact.paraphrases


@each_fact
def test_objects_differ_and_are_not_in_the_prompts(fact: EditRequest) -> None:
    assert fact.target_true is not None
    assert fact.target_true.casefold() != fact.target_new.casefold()
    for prompt in (fact.text, *fact.paraphrases):
        assert not names(prompt, fact.target_new)


@each_fact
def test_paraphrases_and_generations_are_about_the_subject_and_neighbours_are_not(fact: EditRequest) -> None:
    assert all(names(text, fact.subject) for text in (*fact.paraphrases, *fact.generation))
    assert not any(names(probe.prompt, fact.subject) for probe in fact.neighborhood)
    assert all(probe.answer and not names(probe.prompt, probe.answer) for probe in fact.neighborhood)


@each_fact
def test_no_edit_moves_a_neighbour_of_another(fact: EditRequest) -> None:
    subjects = {other.subject for other in FACTS}
    for probe in fact.neighborhood:
        assert not [subject for subject in subjects if names(probe.prompt, subject)], probe.prompt


def test_the_plain_sentences_are_sentences() -> None:
    lines = builtin_text("plain_sentences.txt").splitlines()
    assert len(lines) == len(set(lines)) >= 20
    assert all(len(line.split()) >= 5 and line == line.strip() for line in lines)
