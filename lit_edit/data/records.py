"""From raw records to requests: one function per published format, chosen by the fields that are there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

from lit_edit.data.request import DataError, EditRequest, Probe, shorten

FORMATS = ("auto", "counterfact", "counterfact_flat", "zsre", "facts")

_FACT_FIELDS = {"prompt", "subject", "target_new"}
_READ = (
    *("id", "case_id", "prompt", "subject", "target_new", "target_true", "ground_truth", "paraphrases", "neighborhood"),
    *("portability", "generation", "relation", "references", "locality", "target_id"),
)
"""Fields of lit-edit's own form."""
_WRITTEN_OTHERWISE = {
    "paraphrase_prompts": "paraphrases",
    "neighborhood_prompts": "neighborhood",
    "generation_prompts": "generation",
    "relation_id": "relation",
}


def parse_record(record: object, number: int, form: str = "auto") -> EditRequest:
    """Turn one raw record into a request.

    Args:
        record: A mapping, as read from JSON, CSV or a hub data set.
        number: Its place in the file, which serves as id where the record has none.
        form: One of :data:`FORMATS`; ``auto`` looks at the fields.

    Raises:
        DataError: If a field is missing, of the wrong kind, empty, or does not fit the others.

    Example:
        >>> parse_record({"prompt": "The capital of Italy is", "subject": "Italy", "target_new": "Vienna"}, 7).id
        '#7'
    """
    if not isinstance(record, Mapping):
        raise DataError(f"expected a record with fields, got {type(record).__name__}")
    if form == "auto":
        form = _guess(record)
    try:
        parse = {"counterfact": _counterfact, "counterfact_flat": _flat, "zsre": _zsre, "facts": _facts}[form]
    except KeyError:
        raise DataError(f"unknown format {form!r}; expected one of {', '.join(FORMATS)}") from None
    return parse(record, number)


def _guess(record: Mapping[str, Any]) -> str:
    if "requested_rewrite" in record:
        return "counterfact"
    if "src" in record or ("alt" in record and "prompt" not in record):
        return "zsre"
    if any(name in record for name in ("rephrase_prompt", "locality_prompt", "locality_ground_truth")):
        return "counterfact_flat"
    if _asks_as_easyedit(record.get("portability")) or _asks_as_easyedit(record.get("locality")):
        return "counterfact_flat"
    return "facts"


def _asks_as_easyedit(value: object) -> bool:
    """Tell whether probes by kind are written as EasyEdit and KnowEdit do: the answer is ``ground_truth``."""
    probes = [probe for part in value.values() for probe in _listed(part)] if isinstance(value, Mapping) else []
    return any(isinstance(probe, Mapping) and "ground_truth" in probe for probe in probes)


def _listed(value: object) -> list[Any]:
    """Return a list as it is, and one thing as a list of one."""
    return value if isinstance(value, list) else [value]


def _counterfact(record: Mapping[str, Any], number: int) -> EditRequest:
    """CounterFact as published with ROME: ``requested_rewrite`` and lists of prompts."""
    if "requested_rewrite" not in record:
        raise DataError("missing field requested_rewrite")
    rewrite = record["requested_rewrite"]
    if not isinstance(rewrite, Mapping):
        raise DataError(f"requested_rewrite must be an object, got {type(rewrite).__name__}")
    true = _object(rewrite, "target_true")
    return EditRequest.from_text(
        id=_id(record, number, "case_id"),
        prompt=_text(rewrite, "prompt"),
        subject=_text(rewrite, "subject"),
        target_new=_object(rewrite, "target_new"),
        target_true=true,
        paraphrases=_texts(record.get("paraphrase_prompts"), "paraphrase_prompts"),
        neighborhood=tuple(
            Probe(prompt, true) for prompt in _texts(record.get("neighborhood_prompts"), "neighborhood_prompts")
        ),
        generation=_texts(record.get("generation_prompts"), "generation_prompts"),
        relation=_optional(rewrite, "relation_id") or "",
        references=_texts(record.get("references"), "references"),
        target_id=_object_id(rewrite.get("target_new")),
    )


def _flat(record: Mapping[str, Any], number: int) -> EditRequest:
    """The flat form of EasyEdit: CounterFact, HardEdit and KnowEdit are handed on in it."""
    prompt, subject, target = (_text(record, name) for name in ("prompt", "subject", "target_new"))
    true = _first_alias(record.get("ground_truth"), "ground_truth")
    rephrased = _optional(record, "rephrase_prompt") or _optional(record, "rephrase")
    return EditRequest.from_text(
        id=_id(record, number, "case_id", "id"),
        prompt=prompt,
        subject=subject,
        target_new=target,
        # KnowEdit's ground truth is often the fact to be written itself, and then nothing is known of the old one.
        target_true=None if isinstance(record.get("ground_truth"), list) and true == target else true,
        paraphrases=tuple(p for p in [rephrased] if p),
        neighborhood=_probe(record, "locality_prompt", "locality_ground_truth"),
        portability=_probes_by_kind(record.get("portability"), "portability"),
        locality=_probes_by_kind(record.get("locality"), "locality"),
        generation=_texts(record.get("generation_prompts"), "generation_prompts"),
        references=_texts(record.get("references"), "references"),
        relation=_optional(record, "relation_id") or "",
    )


def _zsre(record: Mapping[str, Any], number: int) -> EditRequest:
    """ZsRE as prepared for MEND: the question is the prompt, ``alt`` the new answer."""
    answers = _texts(record.get("answers"), "answers")
    true = answers[0] if answers else None
    target = _text(record, "alt")
    return EditRequest.from_text(
        id=_id(record, number, "case_id", "id"),
        prompt=_text(record, "src"),
        subject=_text(record, "subject"),
        target_new=target,
        target_true=None if true is None or true.strip() == target.strip() else true,
        paraphrases=tuple(p for p in [_optional(record, "rephrase")] if p),
        # The questions of Natural Questions come without a question mark; published evaluations add it.
        neighborhood=tuple(
            Probe(f"{probe.prompt.rstrip('?')}?", probe.answer) for probe in _probe(record, "loc", "loc_ans")
        ),
        portability=_probes_by_kind(record.get("portability"), "portability"),
        locality=_probes_by_kind(record.get("locality"), "locality"),
    )


def _facts(record: Mapping[str, Any], number: int) -> EditRequest:
    """lit-edit's own form, and the user's: ``prompt, subject, target_new``, the rest optional."""
    _check_names(record)
    missing = sorted(_FACT_FIELDS - {name for name, value in record.items() if value is not None})
    if missing:
        fields = ", ".join(sorted(_shown(name) for name in record)) or "none"
        raise DataError(f"missing field {', '.join(missing)} (the record has: {shorten(fields)})")
    return EditRequest.from_text(
        id=_id(record, number, "id", "case_id"),
        prompt=_text(record, "prompt"),
        subject=_text(record, "subject"),
        target_new=_text(record, "target_new"),
        target_true=_optional(record, "target_true") or _first_alias(record.get("ground_truth"), "ground_truth"),
        paraphrases=_texts(record.get("paraphrases"), "paraphrases"),
        neighborhood=_probes(record.get("neighborhood"), "neighborhood"),
        portability=_own_kinds(record, "portability"),
        generation=_texts(record.get("generation"), "generation"),
        relation=_optional(record, "relation") or "",
        references=_texts(record.get("references"), "references"),
        locality=_own_kinds(record, "locality"),
        target_id=_optional(record, "target_id") or "",
    )


def _check_names(record: Mapping[str, Any]) -> None:
    """Refuse fields that look like one of ours written otherwise; what else a record holds is its own affair.

    Raises:
        DataError: If there is one: left unread, its probes would be missing without a word.
    """
    unread = [name for name in record if isinstance(name, str) and name not in _READ and record[name]]
    for name in unread:
        meant = _WRITTEN_OTHERWISE.get(name) or next(iter(get_close_matches(name.lower(), _READ, 1, 0.87)), None)
        if meant is not None and meant not in record:
            raise DataError(f"unknown field {_shown(name)}; did you mean {meant}?")


def _own_kinds(record: Mapping[str, Any], name: str) -> dict[str, tuple[Probe, ...]]:
    kinds = _mapping(record.get(name), name)
    return {str(kind): _probes(probes, f"{name}.{kind}") for kind, probes in kinds.items()}


def _probes_by_kind(value: object, name: str) -> dict[str, tuple[Probe, ...]]:
    """Return the probes of EasyEdit and KnowEdit: by kind, one or a list of ``{prompt, ground_truth}``.

    An answer is a text, a list of aliases, or a list of lists of them; the first is taken. Probes with no answer are
    left out (EasyEdit skips them), and kinds with no probe. EasyEdit's zsRE has one portability probe of its own form.
    """
    kinds = _mapping(value, name)
    if {"New Question", "New Answer"} <= set(kinds):
        return {"one_hop": (Probe(_text(kinds, "New Question"), _text(kinds, "New Answer")),)}
    found: dict[str, tuple[Probe, ...]] = {}
    for kind, part in kinds.items():
        where = f"{name}.{shorten(_shown(kind), 40)}"
        if part is None or isinstance(part, str):
            raise DataError(f"{where} must be a list of {{prompt, ground_truth}}, got {type(part).__name__}")
        probes = []
        for probe in _listed(part):
            if not isinstance(probe, Mapping):
                raise DataError(f"{where} must be a list of {{prompt, ground_truth}}, got {type(probe).__name__} in it")
            try:
                field = "ground_truth" if "ground_truth" in probe else "answer"
                answer = _first_alias(probe.get(field), field)
                prompt = _text(probe, "prompt")
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
            if answer is not None:
                probes.append(Probe(prompt, answer))
        if probes:
            found[str(kind)] = tuple(probes)
    return found


def _first_alias(value: object, name: str) -> str | None:
    """Return a text, or the first one that is not empty of a list (of lists) of texts; ``None`` if there is none."""
    aliases = [alias for part in _listed(value) for alias in _listed(part)]
    return next((found for alias in aliases if (found := _optional({name: alias}, name)) is not None), None)


def _object_id(value: object) -> str:
    """Return the id of one of CounterFact's objects, if it has one."""
    return (_optional(value, "id") or "") if isinstance(value, Mapping) else ""


def _id(record: Mapping[str, Any], number: int, *names: str) -> str:
    value = next((record[name] for name in names if record.get(name) is not None), f"#{number}")
    text = _written(value)
    if text is None:
        raise DataError(f"id must be text or a number, got {type(value).__name__}")
    text = text.strip()
    if not text:
        raise DataError("id is empty; leave it out to have the records numbered")
    return text


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if value is None:
        raise DataError(f"missing field {name}")
    text = _written(value)
    if text is None:
        raise DataError(f"{name} must be text, got {type(value).__name__}")
    if not text.strip():
        raise DataError(f"{name} is empty")
    return text.strip()


def _written(value: object) -> str | None:
    """Return a text as it is and a number as text: years and numbers are written without quotes now and then."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        with suppress(ValueError):  # Python refuses to write out integers of thousands of digits
            return str(value)
    return None


def _shown(name: object) -> str:
    """Return a field's name for a message: as it is, or quoted where it holds something that does not show."""
    return str(name) if str(name).isprintable() else repr(name)


def _optional(record: Mapping[str, Any], name: str) -> str | None:
    value = record.get(name)
    return None if value is None or (isinstance(value, str) and not value.strip()) else _text(record, name)


def _object(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, Mapping):
        return _text(record, name)
    try:
        return _text(value, "str")
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


def _texts(value: object, name: str) -> tuple[str, ...]:
    if value is None or value == "":
        return ()
    if isinstance(value, str):  # one text, or several in a CSV cell
        value = value.split("|")
    if not isinstance(value, Iterable) or isinstance(value, Mapping):
        raise DataError(f"{name} must be a list of texts, got {type(value).__name__}")
    texts = tuple(value)
    if any(not isinstance(text, str) for text in texts):
        raise DataError(f"{name} must be a list of texts")
    return tuple(text.strip() for text in texts if text.strip())


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
            probes.append(Probe(_text(probe, "prompt"), _text(probe, "answer")))
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
    return tuple(probes)


def _probe_in_cell(cell: str, name: str) -> dict[str, str]:
    prompt, *answers = cell.split("=>")
    if len(answers) > 1:
        raise DataError(f"{name}: {shorten(cell.strip())!r} has more than one '=>'; several probes are parted by '|'")
    return {"prompt": prompt, "answer": answers[0]} if answers else {"prompt": prompt}


def _probe(record: Mapping[str, Any], prompt: str, answer: str) -> tuple[Probe, ...]:
    """Return the one probe of a record whose prompt and answer stand in two fields, if it has one."""
    asked, said = _optional(record, prompt), _optional(record, answer)
    if asked is None and said is None:
        return ()
    if asked is None or said is None:
        raise DataError(f"{answer} has no {prompt}" if asked is None else f"{prompt} has no {answer}")
    return (Probe(asked, said),)


def _mapping(value: object, name: str) -> Mapping[Any, Any]:
    if value is None or value == "":
        return {}
    if not isinstance(value, Mapping):
        raise DataError(f"{name} must be an object of lists, got {type(value).__name__}")
    return value
