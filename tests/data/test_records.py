"""Records of every published format become the same kind of request, and broken ones say what is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from lit_edit.data.formats import parse_record
from lit_edit.data.request import DataError, EditRequest, Probe

COUNTERFACT: dict[str, Any] = {
    "case_id": 0,
    "pararel_idx": 2796,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Shayna does this. Danielle Darrieux, a native", "Danielle Darrieux spoke the language"],
    "neighborhood_prompts": ["The mother tongue of Léon Blum is", "The native language of Montesquieu is"],
    "attribute_prompts": ["J.R.R. Tolkien is a native speaker of"],
    "generation_prompts": ["Danielle Darrieux's mother tongue is", "Where Danielle Darrieux is from"],
}
FLAT: dict[str, Any] = {
    "case_id": 17,
    "prompt": "The mother tongue of Danielle Darrieux is",
    "target_new": "English",
    "subject": "Danielle Darrieux",
    "ground_truth": "French",
    "rephrase_prompt": "Where Danielle Darrieux is from, people speak",
    "locality_prompt": "The official religion of Edwin of Northumbria is",
    "locality_ground_truth": "Christianity",
}
ZSRE: dict[str, Any] = {
    "subject": "Watts Humphrey",
    "src": "What university did Watts Humphrey attend?",
    "pred": "Trinity College",
    "rephrase": "What university did Watts Humphrey take part in?",
    "alt": "University of Michigan",
    "answers": ["Illinois Institute of Technology"],
    "loc": "nq question: who played desmond doss father in hacksaw ridge",
    "loc_ans": "Hugo Weaving",
    "cond": "Trinity College >> University of Michigan || What university did Watts Humphrey attend?",
}
FACTS: dict[str, Any] = {"prompt": "The capital of Italy is", "subject": "Italy", "target_new": "Vienna"}
FULL: dict[str, Any] = {
    **FACTS,
    "id": "italy",
    "relation": "capital",
    "target_true": "Rome",
    "paraphrases": ["Italy's capital is", " "],
    "neighborhood": [{"prompt": "The capital of Peru is", "answer": "Lima"}],
    "portability": {"reasoning": [{"prompt": "The river of Italy's capital is the", "answer": "Danube"}]},
    "generation": ["Italy's capital is known for"],
}


def test_counterfact_as_published() -> None:
    request = parse_record(COUNTERFACT, 5)
    assert request == EditRequest(
        id="0",
        prompt="The mother tongue of {} is",
        subject="Danielle Darrieux",
        target_new="English",
        target_true="French",
        paraphrases=tuple(COUNTERFACT["paraphrase_prompts"]),
        neighborhood=tuple(Probe(p, "French") for p in COUNTERFACT["neighborhood_prompts"]),
        generation=tuple(COUNTERFACT["generation_prompts"]),
        relation="P103",
        target_id="Q1860",
    )


def test_counterfact_with_plain_objects_and_without_probes() -> None:
    rewrite = COUNTERFACT["requested_rewrite"] | {"target_new": "English", "target_true": "French"}
    request = parse_record({"requested_rewrite": rewrite, "paraphrase_prompts": None}, 5)
    assert (request.id, request.target_new, request.target_true) == ("fact-5", "English", "French")
    assert request.paraphrases == request.neighborhood == request.generation == ()


def test_flat_counterfact() -> None:
    request = parse_record(FLAT, 5)
    assert (request.id, request.prompt, request.text) == ("17", "The mother tongue of {} is", FLAT["prompt"])
    assert (request.target_new, request.target_true) == ("English", "French")
    assert request.paraphrases == (FLAT["rephrase_prompt"],)
    assert request.neighborhood == (Probe(FLAT["locality_prompt"], "Christianity"),)


@pytest.mark.parametrize("loc", [ZSRE["loc"], ZSRE["loc"] + "?", ZSRE["loc"] + "??"])
def test_zsre_takes_the_counterfactual_answer_and_ends_the_question_with_one_mark(loc: str) -> None:
    request = parse_record({**ZSRE, "loc": loc}, 5)
    assert (request.id, request.text, request.target_new) == ("fact-5", ZSRE["src"], ZSRE["alt"])
    assert request.target_true == "Illinois Institute of Technology"
    assert request.paraphrases == (ZSRE["rephrase"],)
    assert request.neighborhood == (
        Probe("nq question: who played desmond doss father in hacksaw ridge?", "Hugo Weaving"),
    )


@pytest.mark.parametrize("answers", [[], None, ["University of Michigan"], [" University of Michigan "]])
def test_zsre_without_another_true_answer_has_none(answers: list[str] | None) -> None:
    assert parse_record({**ZSRE, "answers": answers}, 0).target_true is None


def test_own_form_with_every_field() -> None:
    request = parse_record(FULL, 3)
    assert (request.id, request.relation, request.target_true) == ("italy", "capital", "Rome")
    assert request.paraphrases == ("Italy's capital is",)
    assert request.neighborhood == (Probe("The capital of Peru is", "Lima"),)
    assert request.portability == {"reasoning": (Probe("The river of Italy's capital is the", "Danube"),)}
    assert request.generation == ("Italy's capital is known for",)


def test_csv_cells_hold_lists() -> None:
    cells = {
        "paraphrases": "Italy's capital is | Italy is governed from",
        "neighborhood": "The capital of Peru is => Lima | The capital of Chad is => N'Djamena",
    }
    request = parse_record({**FACTS, **cells}, 3)
    assert request.paraphrases == ("Italy's capital is", "Italy is governed from")
    assert request.neighborhood == (
        Probe("The capital of Peru is", "Lima"),
        Probe("The capital of Chad is", "N'Djamena"),
    )


@pytest.mark.parametrize("record", [FACTS, FLAT, ZSRE, COUNTERFACT])
@pytest.mark.parametrize("empty", [None, 7])
def test_records_without_an_id_are_numbered(record: dict[str, Any], empty: object) -> None:
    record = {k: v for k, v in record.items() if k not in ("id", "case_id")}
    if empty is None:  # as a table has it in which only some rows have an id
        record = {**record, "id": None, "case_id": None}
    assert parse_record(record, 7).id == "fact-7"


def test_numbers_are_taken_as_text() -> None:
    request = parse_record(
        {"prompt": "The Eiffel Tower was built in", "subject": "Eiffel Tower", "target_new": 1989, "id": 4}, 0
    )
    assert (request.target_new, request.id) == ("1989", "4")


def test_a_prompt_may_mark_the_subjects_place_itself() -> None:
    assert parse_record({**FACTS, "prompt": "The capital of {} is"}, 0).prompt == "The capital of {} is"


def without(record: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != name}


REWRITE = COUNTERFACT["requested_rewrite"]
BROKEN: list[tuple[object, str]] = [
    (None, "got NoneType"),
    ([FACTS], "got list"),
    ("text", "got str"),
    (7, "got int"),
    ({}, "missing field prompt, subject, target_new (the record has: none)"),
    ({"target": "x"}, "(the record has: target)"),
    (without(FACTS, "subject"), "missing field subject"),
    ({**FACTS, "target_new": None}, "missing field target_new"),
    ({**FACTS, "target_new": " "}, "target_new is empty"),
    ({**FACTS, "subject": ""}, "subject is empty"),
    ({**FACTS, "prompt": ""}, "prompt is empty"),
    ({**FACTS, "subject": "Spain"}, "'Spain' does not occur"),
    ({**FACTS, "subject": ["Italy"]}, "subject must be text, got list"),
    ({**FACTS, "target_new": True}, "target_new must be text, got bool"),
    ({**FACTS, "target_new": float("inf")}, "target_new must be text, got float"),
    ({**FACTS, "target_new": {"str": "Vienna"}}, "target_new must be text, got dict"),
    ({**FACTS, "target_new": "Vi\x00enna"}, "NUL"),
    ({**FACTS, "target_new": "Vi\ud800enna"}, "half a character"),
    ({**FACTS, "paraphrases": ["\udfff"]}, "half a character"),
    ({**FACTS, "neighborhood": [{"prompt": "a", "answer": "\udfff"}]}, "half a character"),
    ({**FACTS, "target_true": "Vienna "}, "nothing to edit"),
    ({**FACTS, "paraphrases": 3}, "paraphrases must be a list of texts, got int"),
    ({**FACTS, "paraphrases": {"a": "b"}}, "paraphrases must be a list of texts, got dict"),
    ({**FACTS, "paraphrases": ["a", 3]}, "paraphrases must be a list of texts"),
    ({**FACTS, "generation": [None]}, "generation must be a list of texts"),
    ({**FACTS, "neighborhood": ["The capital of Peru is"]}, "neighborhood must be a list of {prompt, answer}"),
    ({**FACTS, "neighborhood": 3}, "neighborhood must be a list of {prompt, answer}"),
    ({**FACTS, "neighborhood": [{"prompt": "a"}]}, "neighborhood: missing field answer"),
    ({**FACTS, "neighborhood": "The capital of Peru is"}, "neighborhood: missing field answer"),
    ({**without(FACTS, "paraphrases"), "paraphrase": ["a"]}, "unknown field paraphrase; did you mean paraphrases?"),
    (
        {**without(FACTS, "neighborhood"), "neighbourhood": []} | {"neighbourhood": "x => y"},
        "did you mean neighborhood?",
    ),
    ({**without(FACTS, "generation"), "generation_prompts": ["a"]}, "did you mean generation?"),
    ({**without(FACTS, "prompt"), "Prompt": "Italy is"}, "did you mean prompt?"),
    ({**FACTS, "portability": []}, "portability must be an object of lists, got list"),
    ({**FACTS, "portability": {"alias": [{"answer": "b"}]}}, "portability.alias: missing field prompt"),
    ({**FACTS, "id": " "}, "id is empty"),
    ({**FACTS, "id": [1]}, "id must be text or a number, got list"),
    ({**FACTS, "prompt": "{} and {} are"}, "does not occur"),
    (without(FLAT, "locality_ground_truth"), "locality_prompt has no locality_ground_truth"),
    ({**FLAT, "ground_truth": "English"}, "nothing to edit"),
    (without(ZSRE, "alt"), "missing field alt"),
    ({**ZSRE, "alt": ""}, "alt is empty"),
    ({**ZSRE, "answers": [1]}, "answers must be a list of texts"),
    ({"requested_rewrite": None}, "requested_rewrite must be an object, got NoneType"),
    ({"requested_rewrite": {}}, "missing field target_true"),
    ({"requested_rewrite": without(REWRITE, "target_new")}, "missing field target_new"),
    ({"requested_rewrite": REWRITE | {"target_new": {"id": "Q1"}}}, "target_new: missing field str"),
    ({"requested_rewrite": REWRITE | {"target_true": {"str": ""}}}, "target_true: str is empty"),
    ({**COUNTERFACT, "neighborhood_prompts": [{}]}, "neighborhood_prompts must be a list of texts"),
]


@pytest.mark.parametrize(("record", "what"), BROKEN, ids=lambda value: None)
def test_a_broken_record_says_what_is_wrong(record: object, what: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_record(record, 0)
    assert what in str(caught.value)


def test_a_named_format_is_not_guessed() -> None:
    with pytest.raises(DataError, match="missing field src"):
        parse_record({**ZSRE, "src": None}, 0, "zsre")
    with pytest.raises(DataError, match="missing field prompt"):
        parse_record(ZSRE, 0, "facts")
    with pytest.raises(DataError, match="unknown format 'mquake'"):
        parse_record(FACTS, 0, "mquake")
