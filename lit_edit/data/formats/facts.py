"""lit-edit's own form, which a user writes: also the rows of a CSV file.

``prompt, subject, target_new``, and if wanted ``id (case_id), target_true (ground_truth), target_id, relation,
paraphrases[], generation[], references[], neighborhood[{prompt, answer}], portability{kind: [{prompt, answer}]},
locality{the same}``. In a cell, texts are parted by ``|`` and probes written ``prompt => answer``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lit_edit.data.fields import first_alias, identity, mapping, optional, shown, text, texts
from lit_edit.data.request import DataError, EditRequest, Probe
from lit_edit.errors import nearest, shorten

_NEEDED = {"prompt", "subject", "target_new"}
_READ = (
    *("id", "case_id", "prompt", "subject", "target_new", "target_true", "ground_truth", "paraphrases", "neighborhood"),
    *("portability", "generation", "relation", "references", "locality", "target_id"),
)
_WRITTEN_OTHERWISE = {
    "paraphrase_prompts": "paraphrases",
    "neighborhood_prompts": "neighborhood",
    "generation_prompts": "generation",
    "relation_id": "relation",
}


def recognises(record: Mapping[str, Any]) -> bool:
    """Take what no published format does: what is missing or meant otherwise is then said."""
    return True


def read(record: Mapping[str, Any], number: int) -> list[EditRequest]:
    """Return the one edit."""
    _check_names(record)
    missing = sorted(_NEEDED - {name for name, value in record.items() if value is not None})
    if missing:
        fields = ", ".join(sorted(shown(name) for name in record)) or "none"
        raise DataError(f"missing field {', '.join(missing)} (the record has: {shorten(fields)})")
    request = EditRequest.from_text(
        id=identity(record, number, "id", "case_id"),
        prompt=text(record, "prompt"),
        subject=text(record, "subject"),
        target_new=text(record, "target_new"),
        target_true=optional(record, "target_true") or first_alias(record, "ground_truth"),
        paraphrases=texts(record, "paraphrases"),
        neighborhood=_probes(record.get("neighborhood"), "neighborhood"),
        portability=_kinds(record, "portability"),
        generation=texts(record, "generation"),
        relation=optional(record, "relation") or "",
        references=texts(record, "references"),
        locality=_kinds(record, "locality"),
        target_id=optional(record, "target_id") or "",
    )
    return [request]


def _check_names(record: Mapping[str, Any]) -> None:
    """Refuse fields that look like one of ours written otherwise: left unread, its probes would be missing silently.

    What else a record holds is its own affair.
    """
    unread = [name for name in record if isinstance(name, str) and name not in _READ and record[name]]
    for name in unread:
        meant = _WRITTEN_OTHERWISE.get(name) or next(iter(nearest(name, _READ, 1, 0.87)), None)
        if meant is not None and meant not in record:
            raise DataError(f"unknown field {shown(name)}; did you mean {meant}?")


def _kinds(record: Mapping[str, Any], name: str) -> dict[str, tuple[Probe, ...]]:
    return {str(kind): _probes(probes, f"{name}.{kind}") for kind, probes in mapping(record, name).items()}


def _probes(value: object, name: str) -> tuple[Probe, ...]:
    if value is None or value == "":
        return ()
    if isinstance(value, str):  # CSV: "prompt => answer | prompt => answer"
        value = [_probe_in_cell(part, name) for part in value.split("|")]
    if not isinstance(value, Iterable):
        raise DataError(f"{name} must be a list of {{prompt, answer}}")
    probes = []
    for probe in value:
        if not isinstance(probe, Mapping):
            raise DataError(f"{name} must be a list of {{prompt, answer}}; in CSV write 'prompt => answer | ...'")
        try:
            probes.append(Probe(text(probe, "prompt"), text(probe, "answer")))
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
    return tuple(probes)


def _probe_in_cell(cell: str, name: str) -> dict[str, str]:
    prompt, *answers = cell.split("=>")
    if len(answers) > 1:
        raise DataError(f"{name}: {shorten(cell.strip())!r} has more than one '=>'; several probes are parted by '|'")
    return {"prompt": prompt, "answer": answers[0]} if answers else {"prompt": prompt}
