"""The flat form of EasyEdit: CounterFact, HardEdit and KnowEdit (WikiData, ZsRE) are handed on in it.

``case_id, prompt, target_new, subject, ground_truth, rephrase_prompt (rephrase), locality_prompt,
locality_ground_truth``; KnowEdit has ``portability{kind: [{prompt, ground_truth}]}`` and ``locality{the same}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_edit.data.fields import first_alias, identity, listed, optional, probe, probes_by_kind, text, texts
from lit_edit.data.request import EditRequest


def recognises(record: Mapping[str, Any]) -> bool:
    """Know it by its own names of probes, or by probes whose answer is a ``ground_truth``."""
    if any(name in record for name in ("rephrase_prompt", "locality_prompt", "locality_ground_truth")):
        return True
    return _asks_as_easyedit(record.get("portability")) or _asks_as_easyedit(record.get("locality"))


def _asks_as_easyedit(value: object) -> bool:
    probes = [probe for part in value.values() for probe in listed(part)] if isinstance(value, Mapping) else []
    return any(isinstance(probe, Mapping) and "ground_truth" in probe for probe in probes)


def read(record: Mapping[str, Any], number: int) -> list[EditRequest]:
    """Return the one edit."""
    prompt, subject, target = (text(record, name) for name in ("prompt", "subject", "target_new"))
    true = first_alias(record, "ground_truth")
    rephrased = optional(record, "rephrase_prompt") or optional(record, "rephrase")
    request = EditRequest.from_text(
        id=identity(record, number, "case_id", "id"),
        prompt=prompt,
        subject=subject,
        target_new=target,
        # KnowEdit's ground truth is often the fact to be written itself, and then nothing is known of the old one.
        target_true=None if isinstance(record.get("ground_truth"), list) and true == target else true,
        paraphrases=(rephrased,) if rephrased else (),
        neighborhood=probe(record, "locality_prompt", "locality_ground_truth"),
        portability=probes_by_kind(record, "portability"),
        locality=probes_by_kind(record, "locality"),
        generation=texts(record, "generation_prompts"),
        references=texts(record, "references"),
        relation=optional(record, "relation_id") or "",
    )
    return [request]
