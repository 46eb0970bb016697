"""Which edits of a run hold, and why the others do not: from what is on record, in words.

An edit **holds** when every token of its new object is the model's first choice in the bare prompt (the accuracy of
efficacy), as measured at the end. Nothing but plain data is read: the rows of ``ledger/edits.jsonl``, those of
``ledger/answers.jsonl`` and the records of the journal, so that it costs nothing to ask.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lit_edit.data.request import find_subject
from lit_edit.errors import counted, shorten
from lit_edit.ledger.left_out import left_out

State = Literal[
    "holds", "forgotten", "never took", "fails", "not measured", "replaced", "undone", "refused", "left out"
]
"""``fails``: it does not hold, and nobody has measured whether it did right after it was made."""

FAILED: tuple[State, ...] = ("never took", "fails", "forgotten", "refused", "left out")
"""The states of edits that do not hold, in the order in which a person wants to hear of them."""

TAKEN_OUT: tuple[State, ...] = ("replaced", "undone")
"""The states of edits that somebody, or a later edit, has taken out: nothing failed."""

_NOT_MADE: tuple[State, ...] = ("refused", "left out")

REACHED = 0.5
"""A target whose probability stays below this was not found, whatever was asked for."""

_MOST, _EDITS = 3, 10  # edits that are named as the reason of another, and in a command
_ROWS = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """What has become of one edit."""

    number: int | None  # in the order of making; None for an edit that was refused
    id: str  # in the data
    prompt: str  # filled; empty for a refused edit of which the record has the id alone
    wanted: str  # the new object
    state: State  # what has become of it
    said: str | None = None  # instead: the first choices, up to the first that leaves the new object
    reasons: tuple[str, ...] = ()  # why it does not hold, the likeliest first
    place: str = ""  # file and line of what was not made

    @property
    def failed(self) -> bool:
        """Whether it was asked for and is not what the model says, though nobody has taken it out."""
        return self.state in FAILED

    def as_dict(self) -> dict[str, Any]:
        """Return it as primitives, for programs; ``holds`` is ``None`` where that was not measured."""
        holds = None if self.state == "not measured" else self.state == "holds"
        return {**asdict(self), "reasons": list(self.reasons), "holds": holds}


def judge(edits: _ROWS, answers: _ROWS, records: _ROWS) -> list[Verdict]:
    """Return what has become of every edit that was asked for: those made, in order, and behind them those refused.

    Args:
        edits: As in ``ledger/edits.jsonl``; the marks in it that begin with ``final_`` are of the model as it is now.
        answers: As in ``ledger/answers.jsonl``.
        records: Of the journal, without their tensors.

    Example:
        >>> edit = {"number": 1, "id": "a", "status": "holds", "subject": "Italy", "prompt": "The capital of Italy is",
        ...         "target_new": "Vienna", "immediate_accuracy": True, "final_accuracy": False}
        >>> [(verdict.state, verdict.reasons) for verdict in judge([edit], [], [])]
        [('forgotten', ('it held right after it was made',))]
    """
    context = _Context(edits, answers, records)
    made = [_judge(row, context) for row in edits]
    return made + [_not_made(row) for row in left_out(records)]


def _not_made(row: Mapping[str, Any]) -> Verdict:
    place = "" if row["file"] is None else row["file"] if row["line"] is None else f"{row['file']}:{row['line']}"
    state: State = "left out" if row["kind"] == "broken" else "refused"
    return Verdict(None, row["id"], row["prompt"], row["target_new"], state, None, (row["reason"],), place)


class _Context:
    """What an edit is judged by, beside itself."""

    def __init__(self, edits: _ROWS, answers: _ROWS, records: _ROWS) -> None:
        self.answers = {row["number"]: row for row in answers}
        self.aim: float | None = None
        self.templates: dict[int, str] = {}
        self.removed: dict[int, Mapping[str, Any]] = {}  # by number: the record that took it out, the last one counts
        for record in records:
            if record["kind"] == "begin":
                self.aim = record.get("settings", {}).get("target.probability") or None
            for entry in record.get("entries", ()):
                self.templates[entry["number"]] = (entry.get("request") or {}).get("prompt", "")
            self.removed |= dict.fromkeys(record.get("removed", ()), record)
        self.by_key: dict[str, list[Mapping[str, Any]]] = {}
        self.by_subject: dict[str, list[Mapping[str, Any]]] = {}
        for row in edits:
            if row["status"] == "holds":
                self.by_key.setdefault(self.key(row), []).append(row)
                self.by_subject.setdefault(row["subject"].casefold(), []).append(row)

    def key(self, row: Mapping[str, Any]) -> str:
        """Return a prompt up to the end of its subject: the model reads nothing else where it looks the subject up."""
        before, place, _ = self.templates.get(row["number"], "").partition("{}")
        if place:
            return f"{before}{row['subject']}"
        at = find_subject(row["prompt"], row["subject"])
        return "" if at is None else row["prompt"][: at + len(row["subject"])]

    def rivals(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Return the edits in the model that want something else of the same key, and those of the same subject."""
        key = self.key(row) if _looks_up(row) else ""
        same_key = _others(row, self.by_key.get(key, ()) if key else ())
        same_subject = _others(row, self.by_subject[row["subject"].casefold()])
        return same_key, [number for number in same_subject if number not in same_key]


def _others(row: Mapping[str, Any], rows: _ROWS) -> list[int]:
    return [o["number"] for o in rows if o["number"] != row["number"] and o["target_new"] != row["target_new"]]


def _looks_up(row: Mapping[str, Any]) -> bool:
    """Tell whether the editor wrote to the subject's key: such editors put on record how far the state had to move."""
    return "residual_norm" in row


def _judge(row: Mapping[str, Any], context: _Context) -> Verdict:
    about = (row["number"], row["id"], row["prompt"], row["target_new"])
    if row["status"] != "holds":
        return Verdict(*about, *_taken_out(row, context))
    held, took = row.get("final_accuracy"), row.get("immediate_accuracy")
    if held is None:
        return Verdict(*about, "not measured")
    if held:
        return Verdict(*about, "holds", row["target_new"])
    prompts = context.answers.get(row["number"], {}).get("prompts", ())
    own: Mapping[str, Any] = next((prompt for prompt in prompts if prompt["kind"] == "efficacy"), {})
    said = own["final"]["choice"] if "final" in own else None
    state: State = "fails" if took is None else "forgotten" if took else "never took"
    return Verdict(*about, state, said, tuple(_reasons(row, state, context)))


def _taken_out(row: Mapping[str, Any], context: _Context) -> tuple[State, None, tuple[str, ...]]:
    record = context.removed.get(row["number"], {})
    entries = record.get("entries", ())
    if record.get("kind") != "edit" or not entries:
        return "undone", None, () if row["status"] == "undone" else (row["status"],)
    same = [entry for entry in entries if entry["subject"].casefold() == row["subject"].casefold()] or entries
    by = " or ".join(f"edit {e['number']} ({_short(e['prompt'])} → {_short(e['target_new'])})" for e in same)
    return "replaced", None, (f"by {by}",)


def _reasons(row: Mapping[str, Any], state: State, context: _Context) -> list[str]:
    """Return why an edit that was measured does not hold."""
    reached, aim = row.get("target_probability"), context.aim or REACHED
    missed = []
    if reached is not None and reached < aim:
        asked = f" of the {show_p(context.aim)} asked for" if context.aim else ""
        missed.append(f"its target reached only p {show_p(reached)}{asked} when it was fitted")
    same_key, same_subject = context.rivals(row)
    reasons = []
    if state == "forgotten":
        since = row.get("missed_since")
        p = f" (p {show_p(probability(row['immediate_target_nll']))})" if "immediate_target_nll" in row else ""
        lost = f", and no longer when it was measured after edit {since}" if since else ""
        reasons.append(f"it held right after it was made{p}{lost}")
    first = state != "forgotten" and reached is not None and reached < REACHED  # there was nothing to write
    if first:
        reasons += missed
    if _looks_up(row) and context.answers.get(row["number"], {}).get("lookup") == 0:
        reasons.append("its subject is the first token of the prompt: no token stands before it")
    if same_key:
        reasons.append(f"it shares its key with {_named(same_key)}: the prompts are the same up to the subject's end")
    if same_subject:
        reasons.append(f"it shares its subject with {_named(same_subject)}")
    if not first:
        reasons += missed
    if state == "never took" and not reasons:
        found = "" if reached is None else f"its target was found (p {show_p(reached)}), but "
        reasons.append(f"{found}writing it did not make it the first choice")
    return reasons


def _named(numbers: Sequence[int]) -> str:
    *rest, last = [str(number) for number in numbers[:_MOST]]
    if len(numbers) > _MOST:
        return f"edits {', '.join([*rest, last])} and {len(numbers) - _MOST} more"
    return f"edits {', '.join(rest)} and {last}" if rest else f"edit {last}"


# ---- in words -----------------------------------------------------------------------------------------------------


def counts(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """Return how many edits were made, are in the model, hold, were refused, and how many records were left out."""
    states = [verdict.state for verdict in verdicts]
    not_made = {state: states.count(state) for state in _NOT_MADE}
    made = len(states) - sum(not_made.values())
    there = made - states.count("replaced") - states.count("undone")
    named = {state.replace(" ", "_"): number for state, number in not_made.items()}
    return {"made": made, "in_model": there, "holding": states.count("holds"), **named}


def headline(verdicts: Sequence[Verdict]) -> str:
    """Say how many edits were made and how many hold.

    Example:
        >>> one = Verdict(1, "a", "The capital of Italy is", "Vienna", "holds")
        >>> headline([one, Verdict(2, "b", "The capital of Peru is", "Rome", "undone")])
        '2 edits made, 1 holds; 1 undone'
    """
    number = counts(verdicts)
    unknown = sum(verdict.state == "not measured" for verdict in verdicts)
    made, holding = number["made"], number["holding"]
    text = f"{counted(made, 'edit')} made, "
    if unknown:  # of a run that has not ended, or that was changed and not measured
        text += f"{number['in_model']} in the model; whether they hold was not measured"
    else:
        text += f"{holding} hold{'s' if holding == 1 else ''}"
    states = [verdict.state for verdict in verdicts]
    beside = [
        f"{states.count(state)} {state}" for state in ("replaced", "undone", "refused", "left out") if state in states
    ]
    return "; ".join([text, *([", ".join(beside)] if beside else [])])


def failures(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Return the edits that failed, by kind, then in order."""
    return sorted((v for v in verdicts if v.failed), key=lambda v: FAILED.index(v.state))  # stable: then by number


def to_tell(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Return the edits that do not hold: those that failed, and behind them those that were taken out."""
    taken_out = (verdict for verdict in verdicts if verdict.state in TAKEN_OUT)
    return failures(verdicts) + sorted(taken_out, key=lambda verdict: TAKEN_OUT.index(verdict.state))


def closing_lines(verdicts: Sequence[Verdict], run: str | None = None, most: int | None = 10) -> list[str]:
    """Say how many edits hold, which do not and why (of so many at most), and what can be done about it.

    Without the folder of a ``run`` no commands are named. None of the lines holds a line break.
    """
    failed = to_tell(verdicts)
    shown = failed[:most]
    lines = [headline(verdicts), *(line for verdict in shown for line in explain(verdict))]
    if len(failed) > len(shown):
        where = f": lit-edit log --run {run}" if run else ""
        lines.append(f"and {len(failed) - len(shown)} more{where}")
    return lines + ([] if run is None else next_commands(failed, run))


def explain(verdict: Verdict) -> list[str]:
    """Say of one edit what was wanted, what is said instead, and the likely reason.

    Example:
        >>> verdict = Verdict(7, "a", "The capital of Italy is", "Vienna", "forgotten", " Rome", ("it was full", "old"))
        >>> print(*explain(verdict), sep=chr(10))
          7 forgotten: “The capital of Italy is” → “Vienna”, but the model says “Rome”
            it was full; old
    """
    name = f"{verdict.number} {verdict.state}" if verdict.number else f"{verdict.state}"
    name += f", {verdict.place}" if verdict.place else ""
    asked = f"“{_short(verdict.prompt)}” → “{_short(verdict.wanted)}”" if verdict.prompt else repr(verdict.id)
    if verdict.state == "left out":  # of a record that cannot be read nothing else is known
        return [f"  {name}: {visible('; '.join(verdict.reasons))}"]
    told = "" if verdict.said is None else f", but the model says “{_short(verdict.said)}”"
    why = [f"    {visible('; '.join(verdict.reasons))}"] if verdict.reasons else []
    return [f"  {name}: {asked}{told}", *why]


def next_commands(failed: Sequence[Verdict], run: str) -> list[str]:
    """Return the commands that go on from edits that do not hold; empty where there are none."""
    missed = [str(verdict.number) for verdict in failed if verdict.state in ("never took", "fails", "forgotten")]
    commands = [f"lit-edit log --run {run}{' --failed' if any(v.failed for v in failed) else ''}"] if failed else []
    if missed:
        commands += [
            f"lit-edit undo --run {run} --edit {','.join(missed[:_EDITS])}"
            + (f"  # the first {_EDITS} of {len(missed)}" if len(missed) > _EDITS else ""),
            f"lit-edit fit --config {run}/config.yaml --continue {run} --data FILE --run_name NAME",
        ]
    if undone := [str(verdict.number) for verdict in failed if verdict.state == "undone"]:
        commands.append(f"lit-edit redo --run {run} --edit {','.join(undone[:_EDITS])}")
    return ["Go on with", *(f"  {command}" for command in commands)] if commands else []


def visible(text: str) -> str:
    """Return a text in one line; blanks can be seen where there is nothing else.

    Example:
        >>> visible(" Rome"), visible(chr(10)), visible("  "), visible("a" + chr(10) + "b")
        ('Rome', '⏎', '␣', 'a⏎b')
    """
    shown = text.strip(" \t").replace("\t", " ").replace("\n", "⏎")
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "", shown) or ("␣" if text else "")


def _short(text: str) -> str:
    return shorten(visible(text), 100)


def show_p(value: float | None) -> str:
    """Return a probability.

    Example:
        >>> show_p(0.9503), show_p(0.00012), show_p(1.0), show_p(None)
        ('0.95', '0.0001', '1.00', '–')
    """
    if value is None:
        return "–"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}" if value >= 0.001 else f"{value:.1g}"


def probability(nll: Any) -> float | None:
    """Return the probability of a negative log-likelihood; ``None`` where there is none."""
    return math.exp(-nll) if isinstance(nll, (int, float)) and math.isfinite(nll) else None
