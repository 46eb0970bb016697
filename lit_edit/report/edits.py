"""The edits of a run as a reader wants them: what was wanted, what was said before and after, and what went wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_edit.report.reading import RunRecord
from lit_edit.runs.holding import REACHED, probability, show_p, visible

STATES = {  # by name: how it is shown, and whether it is good
    "holds": "good",
    "preferred only": "fair",
    "forgotten": "bad",
    "never took": "bad",
    "fails": "bad",
    "made": "plain",
    "taken out": "plain",
}
FAILED = ("never took", "forgotten", "fails", "preferred only", "taken out")


@dataclass(frozen=True)
class Said:
    """What a model said to a prompt.

    Attributes:
        text: Its first choices, as far as they are its own words.
        hit: Whether they are all of the wanted object.
        probability: Geometric mean of the wanted object's token probabilities.
        other: The same of the object that is not wanted, where it is known.
    """

    text: str
    hit: bool
    probability: float | None
    other: float | None

    @property
    def preferred(self) -> bool | None:
        """Whether the wanted object is likelier than the other one; ``None`` without another."""
        if self.probability is None or self.other is None:
            return None
        return self.probability > self.other


@dataclass
class Edit:
    """One edit.

    Attributes:
        number: In the order of making.
        id: In the data.
        before: Of the prompt, what stands before the subject.
        subject: What it is about.
        after: Of the prompt, what stands behind the subject.
        wanted: The object that was written.
        old: The object that was true, where it is known.
        base: What the unedited model said.
        immediate: What was said right after the edit.
        final: What was said at the end.
        state: One of :data:`STATES`.
        why: Of what did not go well, a sentence.
        time: When it was made.
        facts: Numbers of the making.
    """

    number: int
    id: str
    before: str
    subject: str
    after: str
    wanted: str
    old: str | None
    base: Said | None
    immediate: Said | None
    final: Said | None
    state: str = "made"
    why: str = ""
    time: str = ""
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """The prompt with its subject."""
        return f"{self.before}{self.subject}{self.after}"

    @property
    def tone(self) -> str:
        """How its state is coloured."""
        return STATES[self.state]


@dataclass(frozen=True)
class Changed:
    """A neighbour that is answered otherwise than before.

    Attributes:
        edit: That it is a neighbour of.
        prompt: The neighbour.
        right: Its own answer.
        base: What was said before all edits.
        final: What is said at the end (or right after the edit, where the end was not measured).
        verdict: What became of it.
        tone: How that is coloured.
    """

    edit: Edit
    prompt: str
    right: str
    base: Said
    final: Said
    verdict: str
    tone: str


def edits_of(run: RunRecord) -> list[Edit]:
    """Return all edits ever made, in order."""
    found = []
    for row in run.edits:
        number = row["number"]
        own = next((p for p in run.answers.get(number, ()) if p["kind"] == "efficacy"), None)
        before, subject, after = _parts(str(row["prompt"]), str(row["subject"]))
        edit = Edit(
            number,
            str(row["id"]),
            before,
            subject,
            after,
            str(row["target_new"]),
            own.get("other") if own else None,
            base=_said(own, row, "base"),
            immediate=_said(own, row, "immediate"),
            final=_said(own, row, "final"),
            time=run.times.get(number, "")[:19].replace("T", " "),
            facts={k: v for k, v in row.items() if isinstance(v, float)},
        )
        edit.state, edit.why = _judge(edit, str(row.get("status", "holds")))
        found.append(edit)
    return found


def _parts(prompt: str, subject: str) -> tuple[str, str, str]:
    at = prompt.rfind(subject)
    return (prompt, "", "") if at < 0 else (prompt[:at], subject, prompt[at + len(subject) :])


def _said(own: Mapping[str, Any] | None, row: Mapping[str, Any], stage: str) -> Said | None:
    """Return what was said at a stage: from the answers, or from the list of edits, which has the marks alone."""
    if own is not None and stage in own:
        return answer_of(own[stage])
    if f"{stage}_accuracy" not in row:
        return None
    hit = bool(row[f"{stage}_accuracy"])
    return Said(str(row["target_new"]) if hit else "", hit, probability(row.get(f"{stage}_target_nll")), None)


def answer_of(answer: Mapping[str, Any]) -> Said:
    """Return an answer of ``ledger/answers.jsonl``."""
    return Said(
        visible(str(answer["choice"])),
        bool(answer["hit"]),
        probability(answer.get("nll")),
        probability(answer.get("other_nll")),
    )


def _judge(edit: Edit, status: str) -> tuple[str, str]:
    """Return an edit's state, and why it is not the best one."""
    if status != "holds":
        return "taken out", status
    last = edit.final or edit.immediate
    if last is None:
        return "made", ""
    if last.hit:
        return "holds", ""
    told = f"the model says “{last.text}”" if last.text else "the model says something else"
    if last.preferred:
        first = ""
        if edit.immediate is not None and edit.final is not None:
            first = (
                "; it was said right after the edit"
                if edit.immediate.hit
                else "; right after the edit it was no better"
            )
        return "preferred only", (
            f"“{edit.wanted}” is preferred to “{edit.old}” (p {show_p(last.probability)} against "
            f"{show_p(last.other)}), but {told}{first}"
        )
    now = f"p({edit.wanted}) is {show_p(last.probability)}"
    if last.other is not None:
        now += f", p({edit.old}) is {show_p(last.other)}"
    reached = edit.facts.get("target_probability")
    if edit.immediate is not None and edit.immediate.hit and edit.final is not None:
        return "forgotten", f"it held right after the edit (p {show_p(edit.immediate.probability)}); now {told}: {now}"
    if edit.immediate is None:
        return "fails", f"{told}: {now}"
    if reached is not None and reached < REACHED:
        return "never took", f"no target was found: p reached only {show_p(reached)} while it was fitted; {told}: {now}"
    fitted = "" if reached is None else f"its target was found (p {show_p(reached)}), but writing it did not do; "
    return "never took", f"{fitted}{told}: {now}"


def changed_neighbours(run: RunRecord, edits: Sequence[Edit]) -> tuple[list[Changed], int]:
    """Return the neighbours whose first choices changed, worst first, and how many were compared."""
    by_number = {edit.number: edit for edit in edits}
    found, compared = [], 0
    for number, prompts in run.answers.items():
        for prompt in prompts:
            stage = next((s for s in ("final", "immediate") if s in prompt), None)
            if prompt["kind"] != "locality" or "base" not in prompt or stage is None:
                continue
            compared += 1
            base, final = answer_of(prompt["base"]), answer_of(prompt[stage])
            if base.text == final.text:
                continue
            asked = str(prompt["prompt"]), str(prompt["wanted"])
            found.append(Changed(by_number[number], *asked, base, final, *_verdict(base, final, prompt)))
    order = ("bad", "fair", "plain", "good")
    return sorted(found, key=lambda one: (order.index(one.tone), one.edit.number)), compared


def _verdict(base: Said, final: Said, prompt: Mapping[str, Any]) -> tuple[str, str]:
    if final.hit:
        return "now right", "good"
    if _says(final.text, str(prompt.get("other") or "")):
        return "says the edit’s object", "bad"
    if base.hit:
        return "was right", "bad"
    if base.preferred and final.preferred is False:
        return "prefers the edit’s object", "fair"
    return "other words", "plain"


def _says(text: str, name: str) -> bool:
    """Tell whether a text is a name or begins it; a few letters, as of "a" and "Apple", are not enough.

    Example:
        >>> _says("Vien", "Vienna"), _says("the", "the Hague"), _says("Iran", "Iran")
        (True, False, True)
    """
    said, new = text.strip().casefold(), name.strip().casefold()
    return bool(said) and (said == new or (len(said) > 3 and new.startswith(said)))


def failures(edits: Sequence[Edit]) -> list[Edit]:
    """Return the edits that did not do what was wanted, by kind, then in order."""
    return sorted(
        (edit for edit in edits if edit.state in FAILED), key=lambda edit: (FAILED.index(edit.state), edit.number)
    )
