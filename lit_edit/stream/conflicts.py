"""Edits that contradict earlier ones: the same fact, by its words or by its key.

A closed-form solver that is asked for two things at one key finds the middle (methods that remember their edits, D4S
among them, average by nature). Whoever edits a fact twice wants the second answer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lit_edit.data.request import EditRequest
from lit_edit.editors.base import Editor
from lit_edit.ledger.history import EditHistory, LedgerEntry, fact_name

log = logging.getLogger(__name__)

ConflictPolicy = Literal["replace", "average", "refuse"]

SAME_KEY = 0.999
"""Keys of a larger cosine are one and the same.

Nothing below tells facts apart: on SmolLM2-135M "The mother tongue of X is" and "The profession of X is" come to 0.992,
"The mother tongue of X is" and "The native language of X is" to 0.990 (docs/reliability.md). The subject makes the key.
"""


@dataclass(frozen=True)
class Conflict:
    """An earlier edit that a new one contradicts.

    Attributes:
        number: Of the earlier edit.
        reason: For people.
    """

    number: int
    reason: str


def find_conflicts(
    history: EditHistory,
    editor: Editor,
    requests: Sequence[EditRequest],
    window: Sequence[EditRequest],
    policy: ConflictPolicy,
) -> dict[str, list[Conflict]]:
    """Return, by the request's id, the edits that hold and are of the same fact.

    The same fact is one with the same subject and prompt, or one with the same key where something is said before the
    subject ("The mother tongue of Ada is", "The mother tongue of Ada was"). Keys do not tell facts apart where the
    subject opens the prompt: "Ada lives in" and "Ada works for" have one key. Such edits are averaged, and a warning
    says so.
    """
    if policy == "average":
        return {}
    found: dict[str, list[Conflict]] = {}
    for request, similar in zip(requests, editor.similar(requests, window), strict=True):
        numbers = history.same(request.subject, request.text)
        for number, cosine in similar:
            earlier = history.entry(number)
            if not cosine >= SAME_KEY or number in numbers:  # a key of no number is like no other
                continue
            if _opening(request) and _opening_of(earlier):
                numbers.append(number)
            else:
                _warn(request, earlier)
        if numbers:
            found[request.id] = [Conflict(n, _tell(request, history.entry(n), policy)) for n in numbers]
    return found


def superseded(requests: Sequence[EditRequest], policy: ConflictPolicy) -> dict[str, str]:
    """Return why some edits of one step are not to be made: a later one (or, to refuse, an earlier one) is the same."""
    if policy == "average":
        return {}
    kept: dict[tuple[str, str], EditRequest] = {}
    reasons: dict[str, str] = {}
    for request in requests if policy == "refuse" else reversed(requests):
        name = fact_name(request.subject, request.text)
        if name in kept:
            reasons[request.id] = f"edit {kept[name].id!r} of the same step is of the same fact ({request.text!r})"
        kept.setdefault(name, request)
    return reasons


def _opening(request: EditRequest) -> str:
    """Return what a prompt says before its subject."""
    return request.prompt.partition("{}")[0].strip()


def _opening_of(entry: LedgerEntry) -> str:
    return str(entry.request.get("prompt", "")).partition("{}")[0].strip()


def _tell(request: EditRequest, earlier: LedgerEntry, policy: ConflictPolicy) -> str:
    if policy == "replace":
        return f"replaced by {request.id!r} ({request.text!r} -> {request.target_new!r}), the same fact"
    return f"edit {earlier.number} ({earlier.prompt!r} -> {earlier.target_new!r}) is of the same fact"


def _warn(request: EditRequest, earlier: LedgerEntry) -> None:
    log.warning(
        "edits %d (%r) and %r (%r) have one and the same key, because the subject opens the prompt: each takes from "
        "the other. Word them so that what is said stands before the subject",
        earlier.number,
        earlier.prompt,
        request.id,
        request.text,
    )
