"""MQD, the Multi-Question Dataset of the D4S paper (arXiv 2410.23843): one piece of knowledge, asked in three ways.

The paper asks what the kind of a target does to sequential editing. Its own files and templates could not be read,
so this data set is made after its description, from ATOMIC-style events (:mod:`lit_edit.data.events`):

* ``direct``: direct generation. The prompt is continued with the tail itself.
* ``choice``: multiple choice. The answer is the letter of the tail among wrong ones.
* ``truth``: true or false. The answer is ``True`` or ``False``.

All three ask about the same heads and relations in the same order, and their prompts begin with the same words up to
the end of the subject, which is the head: an editor that writes at the subject meets the same keys in all three, and
what differs is the rest of the prompt and the target. Prompts end with words that say what kind of answer is wanted;
after a mere "Answer:" a small model expects anything (docs/studies/mqd.md).

``target_new`` is the right answer. ``target_true``, the object that an edit's target is compared with, is a wrong one
here: a wrong tail, its letter, or the other truth value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from lit_edit.data.events import Event, tails_by_relation
from lit_edit.data.request import DataError, EditRequest, Probe
from lit_edit.errors import ArgumentError, shorten

KINDS = ("direct", "choice", "truth")
LETTERS = "ABCD"
TRUTH = ("True", "False")
NEIGHBOURS = 3
HELD_OUT = 3
"""One head of so many is never edited: neighbours are of these, so that no later edit is about them."""


@dataclass(frozen=True)
class Wording:
    """A sentence about the head ``{}`` that the tail completes, and a question with the same words up to the head."""

    direct: str
    question: str


WORDINGS: dict[str, tuple[Wording, Wording]] = {
    "xIntent": (
        Wording("If {}, it is because PersonX wanted", "If {}, what did PersonX want by it?"),
        Wording("The reason why {} is that PersonX wanted", "The reason why {}: PersonX wanted what?"),
    ),
    "xNeed": (
        Wording("Before {}, PersonX needed", "Before {}, what did PersonX need?"),
        Wording("Some time before {}, PersonX had", "Some time before {}, what did PersonX have to do?"),
    ),
    "xAttr": (
        Wording("Because {}, people call PersonX", "Because {}, what do people call PersonX?"),
        Wording("Seeing that {}, everybody says that PersonX is", "Seeing that {}, what is PersonX said to be?"),
    ),
    "xEffect": (
        Wording("Once {}, PersonX", "Once {}, what happens to PersonX?"),
        Wording("The result when {} is that PersonX", "The result when {}: what happens to PersonX?"),
    ),
    "xReact": (
        Wording("When {}, PersonX feels", "When {}, how does PersonX feel?"),
        Wording("In the moment that {}, the feeling of PersonX is", "In the moment that {}, how is PersonX feeling?"),
    ),
    "xWant": (
        Wording("After {}, PersonX wants", "After {}, what does PersonX want?"),
        Wording("Right after {}, PersonX would like", "Right after {}, what would PersonX like?"),
    ),
    "oEffect": (
        Wording("Now that {}, the others", "Now that {}, what happens to the others?"),
        Wording("The result for others when {} is that they", "The result for others when {}: what happens to them?"),
    ),
    "oReact": (
        Wording("Whenever {}, the others feel", "Whenever {}, how do the others feel?"),
        Wording("Other people hear that {}, and they are", "Other people hear that {}, and how do they feel?"),
    ),
    "oWant": (
        Wording("As soon as {}, the others want", "As soon as {}, what do the others want?"),
        Wording("Other people see that {}, and would like", "Other people see that {}, and what would they like?"),
    ),
}
"""By relation: the words of the edits, and those of their paraphrases."""


@dataclass(frozen=True)
class Seed:
    """What all three kinds ask about.

    Attributes:
        place: Where the answer, a right tail, stands among the options.
        rival: Which of the wrong tails an edit's target is compared with, and the wrong statement says.
        holds: Whether the statement that is to be judged is the right one.
    """

    head: str
    relation: str
    answer: str
    distractors: tuple[str, ...]
    place: int
    rival: int
    holds: bool

    @property
    def options(self) -> tuple[str, ...]:
        """The tails to choose from, in order."""
        wrong = list(self.distractors)
        return (*wrong[: self.place], self.answer, *wrong[self.place :])

    @property
    def wrong(self) -> str:
        """The rival."""
        return self.distractors[self.rival]

    def target(self, kind: str) -> str:
        """The right answer to a kind of question."""
        return {"direct": self.answer, "choice": LETTERS[self.place], "truth": TRUTH[not self.holds]}[kind]

    def other(self, kind: str) -> str:
        """A wrong answer to it."""
        letter = LETTERS[self.options.index(self.wrong)]
        return {"direct": self.wrong, "choice": letter, "truth": TRUTH[self.holds]}[kind]

    def prompt(self, kind: str, wording: int = 0) -> str:
        """The question, with ``{}`` for the head."""
        words = WORDINGS[self.relation][wording]
        if kind == "direct":
            return words.direct
        if kind == "choice":
            options = "\n".join(f"{letter}. {tail}" for letter, tail in zip(LETTERS, self.options, strict=True))
            return f"{words.question}\n{options}\nThe letter of the right answer is"
        said = self.answer if self.holds else self.wrong
        return f"{words.direct} {said}.\nIs this True or False? It is"

    def filled(self, kind: str, wording: int = 0) -> str:
        """The question with the head."""
        return self.prompt(kind, wording).replace("{}", self.head)


def build_mqd(events: Sequence[Event], count: int | None = None, seed: int = 0) -> dict[str, list[EditRequest]]:
    """Make the data set by kind of :data:`KINDS`: requests about the same seeds in the same order.

    The same events and seed give the same one, and a smaller count its beginning; by default all heads and relations
    are asked that can be edited. Of several tails of one head and relation the first is asked for. Letters are in
    balance over every four requests from the first, and truth values over every two.
    """
    edited, held_out = split_heads(events, seed)
    if count is not None and count > len(edited):
        raise ArgumentError(
            f"count must be at most {len(edited)}, got {count}: so many pairs of head and relation can be edited "
            f"(of one head in {HELD_OUT} none is: neighbours are of these); give more events"
        )
    pools = tails_by_relation(events)
    seeds = _seeds(edited[:count], events, pools, seed, "edited")
    others = _seeds(held_out, events, pools, seed, "held out")
    neighbours = [_neighbours(own, others, seed) for own in seeds]
    return {
        kind: [
            EditRequest(
                id=f"mqd-{number:04d}-{kind}",
                prompt=own.prompt(kind),
                subject=own.head,
                target_new=own.target(kind),
                target_true=own.other(kind),
                paraphrases=(own.filled(kind, 1),),
                neighborhood=tuple(Probe(other.filled(kind), other.target(kind)) for other in near),
                relation=own.relation,
            )
            for number, (own, near) in enumerate(zip(seeds, neighbours, strict=True), 1)
        ]
        for kind in KINDS
    }


def split_heads(events: Sequence[Event], seed: int) -> tuple[list[Event], list[Event]]:
    """Return what is asked, as the first event of each head and relation: of heads to edit, and of the others.

    The first relation of every head comes first, then the second of every head: a short stream has no head twice.
    """
    asked: dict[str, dict[str, Event]] = {}
    for event in events:
        asked.setdefault(_key(event.head), {}).setdefault(event.relation, event)
    heads = list(asked)
    Random(f"{seed}/heads").shuffle(heads)
    parts: tuple[list[Event], list[Event]] = ([], [])
    for part, names in zip(parts, (heads[len(heads) // HELD_OUT :], heads[: len(heads) // HELD_OUT]), strict=True):
        rows = [list(asked[name].values()) for name in names]
        for name, row in zip(names, rows, strict=True):
            Random(f"{seed}/relations/{name}").shuffle(row)
        part += [row[turn] for turn in range(max(map(len, rows), default=0)) for row in rows if turn < len(row)]
    return parts


def _seeds(
    asked: Sequence[Event], events: Sequence[Event], pools: dict[str, list[Event]], seed: int, part: str
) -> list[Seed]:
    said: dict[str, list[str]] = {}  # of a head, under any relation
    for event in events:
        said.setdefault(_key(event.head), []).append(event.tail)
    places = _balanced(range(len(LETTERS)), Random(f"{seed}/places/{part}"))
    rivals = _balanced(range(len(LETTERS) - 1), Random(f"{seed}/rivals/{part}"))
    truths = _balanced((True, False), Random(f"{seed}/truths/{part}"))
    return [
        Seed(
            event.head,
            event.relation,
            event.tail,
            _distractors(event, said[_key(event.head)], pools[event.relation], seed),
            next(places),
            next(rivals),
            bool(next(truths)),
        )
        for event in asked
    ]


def _balanced(values: Sequence[int], random: Random) -> Iterator[int]:
    """Yield values without end, in blocks that hold each once."""
    while True:
        yield from random.sample(values, len(values))


def _distractors(event: Event, right: Sequence[str], pool: Sequence[Event], seed: int) -> tuple[str, ...]:
    """Choose wrong answers: tails of the relation that no tail of the head is like, nor they each other."""
    random = Random(f"{seed}/distractors/{_key(event.head)}/{event.relation}")
    wanted = len(LETTERS) - 1
    chosen: list[str] = []
    for other in _drawn(pool, random):
        same_group = event.group and other.group == event.group
        if same_group or any(are_alike(other.tail, tail) for tail in (*right, *chosen)):
            continue
        chosen.append(other.tail)
        if len(chosen) == wanted:
            return tuple(chosen)
    raise DataError(
        f"{shorten(event.head)!r}, {event.relation}: {wanted} wrong answers are needed, the events have {len(chosen)} "
        f"(tails of {event.relation} of other heads{' and groups' if event.group else ''}); give more events"
    )


def _drawn(pool: Sequence[Event], random: Random) -> Iterator[Event]:
    """Yield events in random order: some drawn one by one, which do where there are a hundred thousand, then all."""
    for _ in range(20):
        yield random.choice(pool)
    yield from random.sample(pool, len(pool))


def _neighbours(own: Seed, others: Sequence[Seed], seed: int) -> list[Seed]:
    """Choose seeds whose answers of every kind are not those of this one; of the same relation first."""
    random = Random(f"{seed}/neighbours/{_key(own.head)}/{own.relation}")
    differing = [
        other
        for other in others
        if other.holds != own.holds and other.place != own.place and not are_alike(other.answer, own.answer)
    ]
    same = [other for other in differing if other.relation == own.relation]
    chosen = random.sample(same, min(NEIGHBOURS, len(same)))
    rest = [other for other in differing if other.relation != own.relation]
    return chosen + random.sample(rest, min(NEIGHBOURS - len(chosen), len(rest)))


def are_alike(one: str, other: str) -> bool:
    """Tell whether one tail says the other: all of its words but the little ones are in it.

    Example:
        >>> are_alike("to be very happy", "Happy"), are_alike("to buy a ring", "to buy a car")
        (True, False)
    """
    first, second = (frozenset(_key(text).split()) for text in (one, other))
    first, second = (words - _LITTLE or words for words in (first, second))
    return first <= second or second <= first


_LITTLE = frozenset(("to", "be", "is", "are", "a", "an", "the", "very", "really", "so", "of"))


def _key(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(" .")
