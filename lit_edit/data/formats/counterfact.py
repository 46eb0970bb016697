"""CounterFact as published with ROME (``counterfact.json``, ``multi_counterfact.json``).

``case_id, pararel_idx, requested_rewrite{prompt with {}, relation_id, target_new{str,id}, target_true{str,id},
subject}, paraphrase_prompts[], neighborhood_prompts[], attribute_prompts[], generation_prompts[]``; texts to compare
generations with, ``references[]``, may have been added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_edit.data.fields import identity, optional, text, texts
from lit_edit.data.request import DataError, EditRequest, Probe

BEFORE = ("zsre", "counterfact_flat")


def recognises(record: Mapping[str, Any]) -> bool:
    """Know it by the rewrite."""
    return "requested_rewrite" in record


def read(record: Mapping[str, Any], number: int) -> list[EditRequest]:
    """Return the one edit; neighbours have the same true object as it."""
    if "requested_rewrite" not in record:
        raise DataError("missing field requested_rewrite")
    rewrite = record["requested_rewrite"]
    if not isinstance(rewrite, Mapping):
        raise DataError(f"requested_rewrite must be an object, got {type(rewrite).__name__}")
    true, new = _object(rewrite, "target_true"), rewrite.get("target_new")
    request = EditRequest.from_text(
        id=identity(record, number, "case_id"),
        prompt=text(rewrite, "prompt"),
        subject=text(rewrite, "subject"),
        target_new=_object(rewrite, "target_new"),
        target_true=true,
        paraphrases=texts(record, "paraphrase_prompts"),
        neighborhood=tuple(Probe(prompt, true) for prompt in texts(record, "neighborhood_prompts")),
        generation=texts(record, "generation_prompts"),
        relation=optional(rewrite, "relation_id") or "",
        references=texts(record, "references"),
        target_id=(optional(new, "id") or "") if isinstance(new, Mapping) else "",
    )
    return [request]


def _object(record: Mapping[str, Any], name: str) -> str:
    """Return the text of one of CounterFact's objects."""
    value = record.get(name)
    if not isinstance(value, Mapping):
        return text(record, name)
    try:
        return text(value, "str")
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
