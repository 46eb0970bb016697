"""The edits of a run as a reader wants them: what was wanted, what was said before and after, and what went wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_edit.report.reading import RunRecord
from lit_edit.runs.answers import STAGES
from lit_edit.runs.holding import Verdict, judge, probability, show_p, visible

STATES = {  # those of lit_edit.runs.holding, and one between; by name: how it is coloured
    "holds": "good",
    "preferred only": "fair",
    "forgotten": "bad",
    "never took": "bad",
    "fails": "bad",
    "not measured": "plain",
    "replaced": "plain",
    "undone": "plain",
}
FAILED = ("never took", "forgotten", "fails", "preferred only")
TAKEN_OUT = ("replaced", "undone")


@dataclass(frozen=True)
class Said:
    """What a model said to a prompt."""

    text: str  # its first choices, as far as they are its own words
    hit: bool  # whether they are all of the wanted object
    probability: float | None  # of the wanted object: geometric mean of its tokens'
    other: float | None  # the same of the object that is not wanted, where it is known

    @property
    def preferred(self) -> bool | None:
        """Whether the wanted object is likelier than the other one; ``None`` without another."""
        if self.probability is None or self.other is None:
            return None
        return self.probability > self.other


@dataclass(frozen=True)
class Edit:
    """One edit; its prompt in three parts, of which the subject is the second."""

    number: int
    id: str
    before: str
    subject: str
    after: str
    wanted: str  # the object that was written
    old: str | None  # the object that was true, where it is known
    base: Said | None
    immediate: Said | None
    final: Said | None
    state: str  # one of STATES
    why: str  # of what did not go well
    time: str  # when it was made

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
    """A neighbour that is answered otherwise than before."""

    edit: Edit
    prompt: str
    right: str  # its own answer
    base: Said
    final: Said  # right after the edit, where the end was not measured
    verdict: str
    tone: str


def edits_of(run: RunRecord) -> list[Edit]:
    """Return all edits ever made, in order."""
    own = [_own(run, row["number"]) for row in run.edits]
    said = [{stage: _said(o, row, stage) for stage in STAGES} for o, row in zip(own, run.edits, strict=True)]
    marked = [_marked(row, found) for row, found in zip(run.edits, said, strict=True)]
    verdicts = judge(marked, list(run.answers.values()), run.records)[: len(marked)]  # then come those refused
    return [_edit(run, *about) for about in zip(run.edits, own, said, verdicts, strict=True)]


def _own(run: RunRecord, number: int) -> Mapping[str, Any]:
    prompts = run.answers.get(number, {}).get("prompts", ())
    return next((prompt for prompt in prompts if prompt["kind"] == "efficacy"), {})


def _said(own: Mapping[str, Any], row: Mapping[str, Any], stage: str) -> Said | None:
    """Return what was said at a stage: from the answers, or from the list of edits, which has the marks alone."""
    if stage in own:
        return answer_of(own[stage])
    if f"{stage}_accuracy" not in row:
        return None
    hit = bool(row[f"{stage}_accuracy"])
    return Said(str(row["target_new"]) if hit else "", hit, probability(row.get(f"{stage}_target_nll")), None)


def answer_of(answer: Mapping[str, Any]) -> Said:
    """Return an answer of ``ledger/answers.jsonl``."""
    told = visible(str(answer["choice"]))
    return Said(told, bool(answer["hit"]), probability(answer.get("nll")), probability(answer.get("other_nll")))


def _marked(row: Mapping[str, Any], said: Mapping[str, Said | None]) -> dict[str, Any]:
    """Return a row with the marks of what was said; where the end was not measured, the moment of the edit counts."""
    marks = {f"{stage}_accuracy": found.hit for stage, found in said.items() if found}
    last = said["final"] or said["immediate"]
    return {**row, **marks, **({"final_accuracy": last.hit} if last else {})}


def _edit(
    run: RunRecord,
    row: Mapping[str, Any],
    own: Mapping[str, Any],
    said: Mapping[str, Said | None],
    verdict: Verdict,
) -> Edit:
    prompt, subject, wanted = str(row["prompt"]), str(row["subject"]), verdict.wanted
    if (at := prompt.rfind(subject)) < 0:
        at, subject = len(prompt), ""
    state, old, last = str(verdict.state), own.get("other"), said["final"] or said["immediate"]
    reasons = list(verdict.reasons)
    if last and state in ("forgotten", "never took", "fails"):
        told = f"the model says “{last.text}”" if last.text else "the model says something else"
        p, other = show_p(last.probability), show_p(last.other)
        if last.preferred:
            state = "preferred only"
            reasons.insert(0, f"“{wanted}” is preferred to “{old}” (p {p} against {other}), but {told}")
        else:
            beside = "" if last.other is None else f", p({old}) is {other}"
            reasons.append(f"{told}: p({wanted}) is {p}{beside}")
    return Edit(
        number=row["number"],
        id=str(row["id"]),
        before=prompt[:at],
        subject=subject,
        after=prompt[at + len(subject) :],
        wanted=wanted,
        old=old,
        base=said["base"],
        immediate=said["immediate"],
        final=said["final"],
        state=state,
        why="; ".join(reasons),
        time=run.times.get(row["number"], "")[:19].replace("T", " "),
    )


def changed_neighbours(run: RunRecord, edits: Sequence[Edit]) -> tuple[list[Changed], int]:
    """Return the neighbours whose first choices changed, worst first, and how many were compared."""
    by_number = {edit.number: edit for edit in edits}
    found, compared = [], 0
    for number, row in run.answers.items():
        for prompt in row["prompts"]:
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
    return sorted((edit for edit in edits if edit.state in FAILED), key=lambda edit: FAILED.index(edit.state))


def taken_out(edits: Sequence[Edit]) -> list[Edit]:
    """Return the edits that another edit or somebody has taken out, in order."""
    return [edit for edit in edits if edit.state in TAKEN_OUT]
