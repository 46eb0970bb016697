"""What a model says to the prompts of each edit, before and after: ``ledger/answers.jsonl`` of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_edit.data.request import DataError, EditRequest
from lit_edit.files.paths import read_json_lines, without_nan, write_json_lines
from lit_edit.ledger.history import EditHistory, LedgerEntry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lit_edit.metrics.evaluation import EditResult, ProbeResult

STAGES = ("base", "immediate", "final")

Decode = Callable[[Sequence[int]], str]


def answers_path(folder: Path) -> Path:
    """Return where a run keeps the answers to its prompts."""
    return folder / "ledger" / "answers.jsonl"


def write_answers(
    folder: Path,
    history: EditHistory,
    results: Mapping[str, Mapping[str, EditResult]],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write ``ledger/answers.jsonl``: one line per edit, with all its prompts.

    What an earlier call wrote of the base model and of the moment of the edit stays if it is not measured now.
    ``results`` are by stage and id.
    """
    rows = answers_of(history, results, tokenizer)
    earlier = {row["number"]: row for row in read_answers(folder)}
    for row in rows:
        old = earlier.get(row["number"], {})
        if old.get("id") != row["id"] or len(old["prompts"]) != len(row["prompts"]):
            continue
        for prompt, before in zip(row["prompts"], old["prompts"], strict=True):
            prompt |= {s: before[s] for s in STAGES[:2] if s in before and s not in prompt}
    write_json_lines(answers_path(folder), without_nan(rows))


def answers_of(
    history: EditHistory, results: Mapping[str, Mapping[str, EditResult]], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Return :func:`answer_rows` in words, with ``lookup``: how many tokens stand before the subject's last one."""
    from lit_edit.text.tokens import locate  # imports torch

    rows = answer_rows(history, results, lambda ids: str(tokenizer.decode(list(ids))))
    for row in rows if getattr(tokenizer, "is_fast", False) else ():  # the others do not say where a token lies
        request = EditRequest.from_dict(history.entry(row["number"]).request)
        with suppress(DataError):  # of editors that look no subject up, it may have no token of its own
            row["lookup"] = locate(tokenizer, request.text, request.subject_span).lookup
    return rows


def read_answers(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of ``ledger/answers.jsonl``; none if it is not there or damaged."""
    try:
        rows = read_json_lines(answers_path(folder))
        return [row for row in rows if row["number"] >= 0 and row["id"] and all(map(_is_whole, row["prompts"]))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _is_whole(prompt: Mapping[str, Any]) -> bool:
    said = [prompt[stage] for stage in STAGES if stage in prompt]
    return {"kind", "prompt", "wanted"} <= prompt.keys() and all({"choice", "hit"} <= answer.keys() for answer in said)


def answer_rows(
    history: EditHistory, results: Mapping[str, Mapping[str, EditResult]], decode: Decode
) -> list[dict[str, Any]]:
    """Return one row per edit whose request is on record; ``results`` are by stage and id."""
    from lit_edit.metrics.evaluation import KINDS

    rows = []
    for entry in history.made:
        prompts = list(_prompts(entry))
        for stage in STAGES:
            found = results.get(stage, {}).get(entry.id)
            if found is None or (stage == "final" and entry.number in history.undone):
                continue
            probes = [probe for kind in KINDS for probe in getattr(found, kind)]
            if len(probes) == len(prompts):  # else the data has changed since it was measured
                for prompt, probe in zip(prompts, probes, strict=True):
                    prompt[stage] = _answer(probe, decode)
        if prompts:
            rows.append({"number": entry.number, "id": entry.id, "prompts": prompts})
    return rows


def _prompts(entry: LedgerEntry) -> Iterator[dict[str, Any]]:
    """Yield the prompts of an edit in the order in which they are measured."""
    if not entry.request:
        return
    try:
        request = EditRequest.from_dict(entry.request)
    except DataError:
        return
    new, true = request.target_new, request.target_true
    yield {"kind": "efficacy", "prompt": request.text, "wanted": new, "other": true}
    for text in request.paraphrases:
        yield {"kind": "generalization", "prompt": text, "wanted": new, "other": true}
    for probe in request.neighborhood:
        yield {"kind": "locality", "prompt": probe.prompt, "wanted": probe.answer, "other": new}


def _answer(probe: ProbeResult, decode: Decode) -> dict[str, Any]:
    return {
        "choice": decode(probe.choice[: said(probe.hits)]),
        "hit": all(probe.hits),
        "nll": probe.preferred,
        "other_nll": probe.other,
    }


def said(hits: Sequence[bool]) -> int:
    """Return how many first choices are what the model says by itself: up to the first that leaves the object.

    Behind that one the model has been read on with the object, not with its own words.

    Example:
        >>> said((True, False, True)), said((True, True)), said((False,))
        (2, 2, 1)
    """
    return next((place for place, hit in enumerate(hits, 1) if not hit), len(hits))
