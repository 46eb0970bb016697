"""Facts to trace: prompts about a subject, with the attribute that a model may know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from lit_edit.data.files import read_file
from lit_edit.data.formats import parse_record
from lit_edit.data.request import DataError, find_fault, find_subject
from lit_edit.errors import shorten
from lit_edit.files.paths import expand

BUILTIN = "builtin"
"""Names the facts that come with lit-edit."""

KNOWN_FACTS = "known_facts"
"""Names the field's file, looked for in the working folder."""

KNOWN_FACTS_FILES = ("known_facts.json", "known_1000.json", "known_facts_1209.json")


@dataclass(frozen=True)
class KnownFact:
    """A prompt about a subject and the attribute that completes it.

    Args:
        id: Unique within a file.
        prompt: With the subject written out, for example ``"The Big Bang Theory premieres on"``.
        subject: For example ``"The Big Bang Theory"``.
        attribute: What is known about it, without a leading space, for example ``"CBS"``.
        start: Where the subject begins in the prompt.

    Example:
        >>> fact = KnownFact("3", "The Eiffel Tower is in", "Eiffel Tower", "Paris", 4)
        >>> fact.prompt[slice(*fact.span)]
        'Eiffel Tower'
    """

    id: str
    prompt: str
    subject: str
    attribute: str
    start: int

    @property
    def span(self) -> tuple[int, int]:
        """Start and end of the subject in the prompt."""
        return self.start, self.start + len(self.subject)


def find_file(data: str) -> Path:
    """Return the file that ``--data`` names: a path, :data:`BUILTIN` or :data:`KNOWN_FACTS`."""
    if data == BUILTIN:
        return Path(str(files("lit_edit.data") / "known_facts.json"))
    if data != KNOWN_FACTS:
        return expand(data)
    for folder in (Path(), Path("data")):
        for name in KNOWN_FACTS_FILES:
            if (folder / name).is_file():
                return folder / name
    raise DataError(
        f"--data {KNOWN_FACTS}: none of {', '.join(KNOWN_FACTS_FILES)} lies in the working folder or in data/; put the "
        f"field's file (known_1000.json of ROME) there, give its path with --data FILE, or use --data {BUILTIN}"
    )


def read_facts(path: Path) -> list[KnownFact]:
    """Read the facts of a file.

    Args:
        path: JSON, JSONL or CSV. Records are those of ``known_1000.json`` (``prompt, subject, attribute``, optionally
            ``known_id`` and ``template``), or of a benchmark of edits whose true object is known (CounterFact).

    Raises:
        DataError: On a record that cannot be used (names file and line), or if there is none.
    """
    facts: list[KnownFact] = []
    seen: dict[str, int] = {}
    for number, (line, record) in enumerate(read_file(path)):
        try:
            if isinstance(record, DataError):
                raise record
            fact = parse_fact(record, number)
            if fact.id in seen:
                raise DataError(f"duplicate id {fact.id!r}, first used in line {seen[fact.id]}")
        except DataError as error:
            raise DataError(f"{path}:{line}: {error}") from None
        seen[fact.id] = line
        facts.append(fact)
    if not facts:
        raise DataError(f"{path}: no facts to trace; expected records with prompt, subject and attribute")
    return facts


def parse_fact(record: object, number: int) -> KnownFact:
    """Turn one raw record into a fact; its number, from 0, is the id of one that has none.

    Raises:
        DataError: If a field is missing, empty or no text, or the subject is not in the prompt.

    Example:
        >>> parse_fact({"prompt": "{} is in", "subject": "Oslo", "attribute": "Norway"}, 0).prompt
        'Oslo is in'
    """
    if not isinstance(record, Mapping):
        raise DataError(f"expected a record with fields, got {type(record).__name__}")
    if "attribute" not in record:
        return _from_edit(record, number)
    prompt, subject, attribute = (_text(record, name) for name in ("prompt", "subject", "attribute"))
    template = prompt if "{}" in prompt else record.get("template")
    start = template.find("{}") if isinstance(template, str) and template.count("{}") == 1 else -1
    if template == prompt:
        prompt = prompt.replace("{}", subject, 1)
    if start < 0 or prompt[start : start + len(subject)] != subject:  # the template is of another wording
        found = find_subject(prompt, subject)
        if found is None:
            raise DataError(f"the subject {shorten(subject)!r} does not occur in the prompt {shorten(prompt)!r}")
        start = found
    return KnownFact(str(record.get("known_id", record.get("id", number))), prompt, subject, attribute, start)


def _from_edit(record: Mapping[str, Any], number: int) -> KnownFact:
    if not record.keys() & {"target_true", "ground_truth", "requested_rewrite"}:
        raise DataError("missing field attribute (what is known of the subject)")
    request = parse_record(record, number)
    if request.target_true is None:
        raise DataError("the record does not say what is true (target_true)")
    return KnownFact(request.id, request.text, request.subject, request.target_true, request.subject_span[0])


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if value is None:
        raise DataError(f"missing field {name}")
    if not isinstance(value, str):
        raise DataError(f"{name} must be text, got {type(value).__name__}")
    if not value.strip():
        raise DataError(f"{name} is empty")
    if (fault := find_fault(value)) is not None:
        raise DataError(f"{name} holds {fault}")
    return value.strip()
