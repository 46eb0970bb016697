"""ZsRE as prepared for MEND (``zsre_mend_eval.json``, ``_train``, ``_edit``).

``subject, src, pred, rephrase, alt, answers[], loc ("nq question: ..."), loc_ans, cond``; EasyEdit's
``_portability_gpt4`` has ``portability{"Recalled Relation", "New Question", "New Answer"}`` beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_edit.data.fields import identity, optional, probe, probes_by_kind, text, texts
from lit_edit.data.request import EditRequest, Probe

BEFORE = ("counterfact_flat",)


def recognises(record: Mapping[str, Any]) -> bool:
    """Know it by the question, ``src``, or by ``alt``."""
    return "src" in record or ("alt" in record and "prompt" not in record)


def read(record: Mapping[str, Any], number: int) -> list[EditRequest]:
    """Return the one edit: the question is the prompt, ``alt`` the new answer."""
    answers = texts(record, "answers")
    true = answers[0] if answers else None
    target = text(record, "alt")
    request = EditRequest.from_text(
        id=identity(record, number, "case_id", "id"),
        prompt=text(record, "src"),
        subject=text(record, "subject"),
        target_new=target,
        target_true=None if true == target else true,
        paraphrases=tuple(p for p in [optional(record, "rephrase")] if p),
        # The questions of Natural Questions come without a question mark; published evaluations add it.
        neighborhood=tuple(Probe(f"{one.prompt.rstrip('?')}?", one.answer) for one in probe(record, "loc", "loc_ans")),
        portability=probes_by_kind(record, "portability"),
        locality=probes_by_kind(record, "locality"),
    )
    return [request]
