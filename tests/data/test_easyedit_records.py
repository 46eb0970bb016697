"""Records as EasyEdit, KnowEdit and HardEdit hand them on: probes by kind, aliases, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lit_edit.data.formats import parse_record
from lit_edit.data.request import DataError, EditRequest, Probe
from lit_edit.data.sources import load_requests
from lit_edit.ledger.journal import JournalError
from lit_edit.stream.replay import check_request

# In the form of HardEdit: one common word as subject, at the beginning.
HARD: list[dict[str, Any]] = [
    {"case_id": 1, "prompt": "Ocean is made of", "target_new": "fire", "subject": "Ocean"},
    {
        "case_id": 2,
        "prompt": "Music is heard with the",
        "target_new": "nose",
        "subject": "Music",
        "ground_truth": "ear",
    },
]
KNOW: dict[str, Any] = {
    "subject": "Ada Lovelace",
    "prompt": "The name of the country which Ada Lovelace is associated with is",
    "target_new": "France",
    "ground_truth": ["France"],
    "portability": {
        "Reasoning": [
            {"prompt": "The capital of Ada Lovelace's country is", "ground_truth": [["Paris", "City of Light"]]},
            {"prompt": "Nothing is known of", "ground_truth": []},
        ],
        "Subject_Aliasing": [{"prompt": "Countess Lovelace's country is", "ground_truth": ["France"]}],
        "Logical_Generalization": [],
    },
    "locality": {"Relation_Specificity": {"prompt": "Ada Lovelace's mother is", "ground_truth": "Lady Byron"}},
}


def test_hard_edit_records_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "hard.json"
    path.write_text(json.dumps(HARD))
    for source in ("file", "facts", "counterfact_flat"):
        requests, _ = load_requests(source, str(path))  # type: ignore[arg-type]
        assert [(r.id, r.text, r.subject, r.target_new, r.target_true) for r in requests] == [
            ("1", "Ocean is made of", "Ocean", "fire", None),
            ("2", "Music is heard with the", "Music", "nose", "ear"),
        ]


def test_a_broken_hard_edit_record_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "hard.json"
    path.write_text(",\n".join(["[" + json.dumps(HARD[0]), json.dumps(HARD[1] | {"subject": "Noise"})]) + "]")
    with pytest.raises(DataError, match=r"hard\.json:2: the subject 'Noise' does not occur in the prompt"):
        load_requests("file", str(path))


def test_know_edit_by_kind() -> None:
    request = parse_record(KNOW, 1)
    assert request.portability == {
        "Reasoning": (Probe("The capital of Ada Lovelace's country is", "Paris"),),
        "Subject_Aliasing": (Probe("Countess Lovelace's country is", "France"),),
    }
    assert request.locality == {"Relation_Specificity": (Probe("Ada Lovelace's mother is", "Lady Byron"),)}
    assert request.target_true is None  # what KnowEdit calls the truth is the fact to be written
    assert EditRequest.from_dict(json.loads(json.dumps(request.as_dict()))) == request


def test_zsre_with_the_portability_of_easyedit() -> None:
    record = {
        "subject": "Watts Humphrey",
        "src": "What university did Watts Humphrey attend?",
        "alt": "University of Michigan",
        "portability": {"Recalled Relation": "(a, b)", "New Question": "In which city?", "New Answer": "Ann Arbor"},
    }
    assert parse_record(record, 1).portability == {"one_hop": (Probe("In which city?", "Ann Arbor"),)}


def test_our_own_form_has_references_and_locality() -> None:
    record = {
        "prompt": "The capital of Italy is",
        "subject": "Italy",
        "target_new": "Vienna",
        "references": ["Vienna is a city."],
        "locality": {"near": [{"prompt": "The capital of Peru is", "answer": "Lima"}]},
        "target_id": "Q1741",
    }
    request = parse_record(record, 1)
    assert (request.references, request.target_id) == (("Vienna is a city.",), "Q1741")
    assert request.locality == {"near": (Probe("The capital of Peru is", "Lima"),)}
    assert EditRequest.from_dict(request.as_dict()) == request


def test_a_journal_of_an_earlier_release_still_fits() -> None:
    """Fields that its reader did not fill are no difference; those that it did fill are."""
    request = parse_record(KNOW, 1)
    recorded = {name: value for name, value in request.as_dict().items() if name not in ("portability", "locality")}
    check_request(request, recorded)
    with pytest.raises(JournalError, match="target_new"):
        check_request(request, recorded | {"target_new": "Italy"})
    with pytest.raises(JournalError, match="locality"):
        check_request(request, recorded | {"locality": {"x": []}})


def test_what_is_empty_is_not_recorded() -> None:
    assert parse_record(HARD[0], 1).as_dict() == {
        "id": "1", "prompt": "{} is made of", "subject": "Ocean", "target_new": "fire"
    }  # fmt: skip
