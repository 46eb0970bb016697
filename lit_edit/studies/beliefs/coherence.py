r"""How rational a model's beliefs are behind an edit (arXiv 2406.19354): against an ideal reader, and among themselves.

*Probabilistic coherence* is :math:`|p_{LM}(o) - p_{Bayes}(o)|`, for facts of four kinds and three objects of each: the
one that the ideal reader believed most before the edit, the requested one (where the fact's relation has it), and the
one that it believes most now. *Generation accuracy* is the share of facts whose object, as the ideal reader now
believes it, is the model's first choice in all its tokens. *Logical coherence* compares what the model says of a claim
with what it says of sentences made of it:

.. math:: |p(A) - p(\text{A is true})|,\quad |p(A \wedge B) - p(A)\,p(B)|,\quad |p(A \wedge B) - p(B \wedge A)|,\quad
    |p(A \vee B) - (p(A) + p(B) - p(A)\,p(B))|,\quad |p(A) - (1 - p(\neg A))|,

where :math:`p(A)` is the probability of the object behind subject and relation, and that of a claim, its negation or
two joined is that of ``true`` behind ``... is``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_edit.data.request import EditRequest
from lit_edit.errors import ArgumentError
from lit_edit.metrics.scoring import score_continuations
from lit_edit.studies.beliefs.agent import CERTAINTY, Agent
from lit_edit.studies.beliefs.corpus import Atom, statement
from lit_edit.studies.beliefs.world import Fact, World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lit_edit.models.adapter import ModelAdapter

KINDS: Mapping[str, str] = {
    "edited": "same subject, same relation",
    "dependent": "same subject, dependent relation",
    "relation": "other subject, same relation",
    "other": "other subject, other relation",
}
OBJECTS = ("original", "requested", "now")
GAPS: Mapping[str, str] = {
    "truth": "p(A) and 'A is true'",
    "and": "'A and B' and p(A) p(B)",
    "order": "'A and B' and 'B and A'",
    "or": "'A or B' and p(A) + p(B) - p(A) p(B)",
    "not": "p(A) and 1 - 'not A'",
}


@dataclass(frozen=True)
class Case:
    """One edit and the facts that are asked behind it."""

    fact: Fact  # that is edited
    original: str  # object that the ideal reader believes before
    requested: str  # the new one
    facts: Mapping[str, tuple[Fact, ...]]  # by kind, what is asked
    partner: Atom  # another subject's fact with the object believed of it, for "and" and "or"

    def request(self, number: int) -> EditRequest:
        """Return the edit."""
        subject, relation = self.fact
        return EditRequest(str(number), f"{{}} {relation}", subject, self.requested, self.original, relation=relation)


def draw_cases(world: World, agent: Agent, count: int, probes: int = 10, seed: int = 0) -> list[Case]:
    """Draw edits of upstream facts, each with a dependent one, and what is asked behind them.

    The new object is, of those under which the ideal reader comes to believe another object of a dependent fact, one at
    random; any other one where there is none such. Of other subjects at most ``probes`` facts of each kind are asked.
    """
    draw = random.Random(seed)
    able = [fact for fact in world.facts if world.dependents(fact) and len(world.objects[fact[1]]) > 1]
    if not 1 <= count <= len(able):
        raise ArgumentError(
            f"--limit must be from 1 to {len(able)} (facts with a dependent one, in this world), got {count}"
        )
    found = []
    for fact in draw.sample(able, len(able))[:count]:  # more cases begin with the same ones
        subject, relation = fact
        original, below = agent.best(*fact), world.dependents(fact)
        others = [name for name in world.objects[relation] if name != original]
        telling = [name for name in others if _moves(agent, fact, name, below)]
        elsewhere = [f for f in world.facts if f[0] != subject]
        same = [f for f in elsewhere if f[1] == relation]
        other = [f for f in elsewhere if f[1] != relation and f not in world.dependents((f[0], relation))]
        partner = draw.choice(other or elsewhere or [fact])
        facts = {
            "edited": (fact,),
            "dependent": tuple(below),
            "relation": tuple(draw.sample(same, min(probes, len(same)))),
            "other": tuple(draw.sample(other, min(probes, len(other)))),
        }
        found.append(Case(fact, original, draw.choice(telling or others), facts, (*partner, agent.best(*partner))))
    return found


def _moves(agent: Agent, fact: Fact, value: str, below: Sequence[Fact]) -> bool:
    edited = agent.copy()
    edited.edit(*fact, value)
    return any(edited.best(*other) != agent.best(*other) for other in below)


# ---- what a model believes ----------------------------------------------------------------------------------------


class ModelBeliefs:
    """Probabilities of a model, asked for many at a time."""

    def __init__(self, adapter: ModelAdapter, tokenizer: PreTrainedTokenizerBase) -> None:
        self.adapter, self.tokenizer = adapter, tokenizer
        self.known: dict[tuple[str, str], tuple[float, bool]] = {}

    def ask(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Ask for continuations of prompts, ahead of :meth:`probability` and :meth:`says`."""
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self.known]
        for pair, score in zip(new, score_continuations(self.adapter, self.tokenizer, new), strict=True):
            self.known[pair] = math.exp(-score.nll * len(score.hits)), bool(score.hits.all())

    def probability(self, prompt: str, answer: str) -> float:
        """Return the probability of all tokens of an answer."""
        self.ask([(prompt, answer)])
        return self.known[prompt, answer][0]

    def says(self, prompt: str, answer: str) -> bool:
        """Tell whether an answer is the model's first choice, token by token."""
        self.ask([(prompt, answer)])
        return self.known[prompt, answer][1]


def logical_probes(atom: Atom, partner: Atom) -> dict[str, tuple[str, str]]:
    """Return prompt and answer of each probability that logical coherence is made of.

    Example:
        >>> logical_probes(("Ada", "plays", "chess"), ("Bo", "speaks", "Dutch"))["or"]
        ('Ada plays chess or Bo speaks Dutch is', 'true')
    """
    claims = {
        "A true": statement("truth", [atom]),
        "not": statement("not", [atom]),
        "and": statement("and", [atom, partner]),
        "and turned": statement("and", [partner, atom]),
        "or": statement("or", [atom, partner]),
    }
    plain = {
        name: (f"{subject} {relation}", value) for name, (subject, relation, value) in (("A", atom), ("B", partner))
    }
    return plain | {name: (f"{claim} is", "true") for name, claim in claims.items()}


def logical_gaps(p: Mapping[str, float]) -> dict[str, float]:
    """Return the gaps of :data:`GAPS`, of the probabilities of :func:`logical_probes` by name.

    Example:
        >>> p = {"A": 0.5, "B": 0.5, "A true": 0.5, "and": 0.25, "and turned": 0.25, "or": 0.75, "not": 0.5}
        >>> sorted(set(logical_gaps(p).values()))
        [0.0]
    """
    a, b = p["A"], p["B"]
    return {
        "truth": abs(a - p["A true"]),
        "and": abs(p["and"] - a * b),
        "order": abs(p["and"] - p["and turned"]),
        "or": abs(p["or"] - (a + b - a * b)),
        "not": abs(a - (1 - p["not"])),
    }


def measure_case(beliefs: ModelBeliefs, case: Case, before: Agent, now: Agent) -> dict[str, float]:
    """Return the measurements of one case: of the model behind its edit, against the ideal reader ``now``.

    They are means over the facts of a kind, ``accuracy/KIND`` and ``gap/KIND/OBJECT``; means over the original and the
    requested object, ``logic/GAP``; and ``p/requested``. What cannot be asked is left out.
    """
    asked: list[tuple[str, str, tuple[str, str], float]] = []
    for kind, facts in case.facts.items():
        for subject, relation in facts:
            ideal = now.query(subject, relation)
            objects = {
                "original": before.best(subject, relation),
                "requested": case.requested if relation == case.fact[1] else None,
                "now": now.best(subject, relation),
            }
            for name, value in objects.items():
                if value is not None:
                    asked.append((kind, name, (f"{subject} {relation}", value), ideal[value]))
    logic = [logical_probes((*case.fact, value), case.partner) for value in (case.original, case.requested)]
    beliefs.ask([pair for _, _, pair, _ in asked] + [pair for probes in logic for pair in probes.values()])
    found: dict[str, list[float]] = {}
    for kind, name, pair, ideal_share in asked:
        found.setdefault(f"gap/{kind}/{name}", []).append(abs(beliefs.probability(*pair) - ideal_share))
        if name == "now":
            found.setdefault(f"accuracy/{kind}", []).append(float(beliefs.says(*pair)))
    for probes in logic:
        gaps = logical_gaps({name: beliefs.probability(*pair) for name, pair in probes.items()})
        for name, gap in gaps.items():
            found.setdefault(f"logic/{name}", []).append(gap)
    subject, relation = case.fact
    found["p/requested"] = [beliefs.probability(f"{subject} {relation}", case.requested)]
    return {name: math.fsum(values) / len(values) for name, values in found.items()}


def revised(agent: Agent, case: Case, certainty: float | None = CERTAINTY) -> Agent:
    """Return the ideal reader after the edit."""
    found = agent.copy()
    found.edit(*case.fact, case.requested, certainty)
    return found
