"""Coherence of beliefs that are written down in a table."""

from __future__ import annotations

import math

import pytest

from lit_edit.errors import ArgumentError
from lit_edit.metrics.scoring import score_continuations
from lit_edit.models import ModelAdapter
from lit_edit.studies.beliefs.agent import Agent
from lit_edit.studies.beliefs.coherence import (
    Case,
    ModelBeliefs,
    draw_cases,
    logical_gaps,
    logical_probes,
    measure_case,
    revised,
)
from lit_edit.studies.beliefs.corpus import CorpusConfig, write_sentences
from lit_edit.studies.beliefs.documents import make_tokenizer
from lit_edit.studies.beliefs.world import WorldConfig, generate_world
from lit_edit.testing import tiny_model


def test_logical_gaps_are_as_computed_by_hand() -> None:
    p = {"A": 0.8, "B": 0.5, "A true": 0.7, "and": 0.5, "and turned": 0.2, "or": 0.6, "not": 0.4}
    assert logical_gaps(p) == pytest.approx({"truth": 0.1, "and": 0.1, "order": 0.3, "or": 0.3, "not": 0.2})


def test_each_probability_is_asked_for_in_its_own_words() -> None:
    assert logical_probes(("Ada", "was born in", "Rome"), ("Bo", "speaks", "Dutch")) == {
        "A": ("Ada was born in", "Rome"),
        "B": ("Bo speaks", "Dutch"),
        "A true": ("Ada was born in Rome is", "true"),
        "not": ("not Ada was born in Rome is", "true"),
        "and": ("Ada was born in Rome and Bo speaks Dutch is", "true"),
        "and turned": ("Bo speaks Dutch and Ada was born in Rome is", "true"),
        "or": ("Ada was born in Rome or Bo speaks Dutch is", "true"),
    }


class _Table(ModelBeliefs):
    """Beliefs that are 0.5 unless the table says otherwise; said is what has more than 0.5."""

    def __init__(self, table: dict[tuple[str, str], float]) -> None:
        self.table = table

    def ask(self, pairs: object) -> None:
        pass

    def probability(self, prompt: str, answer: str) -> float:
        return self.table.get((prompt, answer), 0.5)

    def says(self, prompt: str, answer: str) -> bool:
        return self.probability(prompt, answer) > 0.5


class _Ideal(Agent):
    """An ideal reader of given beliefs."""

    def __init__(self, beliefs: dict[tuple[str, str], dict[str, float]]) -> None:
        self.beliefs = beliefs

    def query(self, subject: str, relation: str) -> dict[str, float]:
        return self.beliefs[subject, relation]


def test_a_case_is_measured_as_by_hand() -> None:
    before = _Ideal(
        {("s", "r"): {"a": 0.9, "b": 0.1}, ("s", "d"): {"x": 0.8, "y": 0.2}, ("t", "r"): {"a": 0.7, "b": 0.3}}
    )
    now = _Ideal(before.beliefs | {("s", "r"): {"a": 0.05, "b": 0.95}, ("s", "d"): {"x": 0.3, "y": 0.7}})
    facts = {"edited": (("s", "r"),), "dependent": (("s", "d"),), "relation": (("t", "r"),), "other": ()}
    case = Case(("s", "r"), "a", "b", facts, ("t", "r", "a"))
    table = {("s r", "a"): 0.2, ("s r", "b"): 0.75, ("s d", "x"): 0.9, ("s d", "y"): 0.1, ("t r", "a"): 0.6}
    found = measure_case(_Table(table), case, before, now)
    assert {name: value for name, value in found.items() if not name.startswith("logic")} == pytest.approx(
        {
            "gap/edited/original": 0.15, "gap/edited/requested": 0.2, "gap/edited/now": 0.2, "accuracy/edited": 1.0,
            "gap/dependent/original": 0.6, "gap/dependent/now": 0.6, "accuracy/dependent": 0.0,
            "gap/relation/original": 0.1, "gap/relation/requested": 0.2, "gap/relation/now": 0.1,
            "accuracy/relation": 1.0, "p/requested": 0.75,
        }
    )  # fmt: skip
    # means over the original and the requested object; all claims have 0.5, p(B) 0.6
    assert {name: value for name, value in found.items() if name.startswith("logic")} == pytest.approx(
        {
            "logic/truth": (0.3 + 0.25) / 2,
            "logic/and": ((0.5 - 0.12) + (0.5 - 0.45)) / 2,
            "logic/order": 0.0,
            "logic/or": ((0.8 - 0.12 - 0.5) + (1.35 - 0.45 - 0.5)) / 2,
            "logic/not": (0.3 + 0.25) / 2,
        }
    )


def test_cases_are_edits_that_tell() -> None:
    world = generate_world(WorldConfig(subjects=12))
    agent = Agent.of(world, write_sentences(world, CorpusConfig()))
    cases = draw_cases(world, agent, 8, probes=4, seed=1)
    assert cases == draw_cases(world, agent, 8, probes=4, seed=1)
    assert cases[:3] == draw_cases(world, agent, 3, probes=4, seed=1)
    for case in cases:
        subject, relation = case.fact
        after = revised(agent, case)
        assert case.original == agent.best(*case.fact) != case.requested == after.best(*case.fact)
        assert case.facts["edited"] == (case.fact,)
        assert [world.upstream[r] for s, r in case.facts["dependent"] if s == subject] == [relation]
        assert any(after.best(*fact) != agent.best(*fact) for fact in case.facts["dependent"])
        assert all(s != subject and r == relation for s, r in case.facts["relation"])
        assert all(s != subject and r != relation for s, r in case.facts["other"])
        assert len(case.facts["other"]) == 4
        request = case.request(0)
        assert (request.text, request.target_new) == (f"{subject} {relation}", case.requested)
    with pytest.raises(ArgumentError, match="--limit must be from 1 to 24"):
        draw_cases(world, agent, 25)


def test_a_models_probabilities_are_of_all_tokens_together() -> None:
    tokenizer = make_tokenizer(["a b c d e"])
    adapter = ModelAdapter(tiny_model())
    beliefs = ModelBeliefs(adapter, tokenizer)
    pieces = [score_continuations(adapter, tokenizer, [pair])[0].nll for pair in (("a b", "c"), ("a b c", "d"))]

    assert beliefs.probability("a b", "c d") == pytest.approx(math.exp(-sum(pieces)), rel=1e-5)
