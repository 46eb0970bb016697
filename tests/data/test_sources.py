"""Sources: files of every format, a hub data set, and what happens on broken records."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_edit.data.request import DataError, EditRequest
from lit_edit.data.sources import load_requests

FUZZ = settings(
    max_examples=100, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def fact(country: str, **more: Any) -> dict[str, Any]:
    return {"prompt": f"The capital of {country} is", "subject": country, "target_new": "Vienna", **more}


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.fixture
def mixed(tmp_path: Path) -> str:
    """Good records on lines 1, 3 and 7 and broken ones between them."""
    rows = [
        fact("Italy", id="a"),
        fact("Spain", subject="Portugal"),
        fact("Peru", id="b"),
        "{broken",
        fact("Chad", id="a"),
        "null",
        fact("Cuba", id="c"),
    ]
    return write_jsonl(tmp_path / "mixed.jsonl", rows)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (fact("Spain", subject="Portugal"), "does not occur"),
        (fact("Spain", target_new=""), "target_new is empty"),
        ({"prompt": "x", "subject": "x"}, "missing field target_new"),
        ("{broken", "bad JSON"),
        ("null", "got NoneType"),
        ("[1, 2]", "got list"),
        (fact("Spain", id="first"), "duplicate id 'first', first used at {path}:1"),
        (fact("Spain", target_true="Vienna"), "nothing to edit"),
        (fact("Spain", target_new=["Vienna"]), "must be text, got list"),
    ],
)
def test_a_broken_record_names_file_line_reason_and_way_out(tmp_path: Path, row: Any, what: str) -> None:
    path = write_jsonl(tmp_path / "edits.jsonl", [fact("Italy", id="first"), "", row, fact("Peru")])
    with pytest.raises(DataError) as caught:
        load_requests("file", path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert what.format(path=path) in str(caught.value)
    assert "--data.on_error skip" in str(caught.value)


def test_skip_goes_on_counts_and_warns(mixed: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="lit_edit"):
        requests, skipped = load_requests("file", mixed, on_error="skip")
    assert [r.id for r in requests] == ["a", "b", "c"]
    assert [place for place, _ in skipped] == [f"{mixed}:{n}" for n in (2, 4, 5, 6)]
    assert "duplicate id 'a'" in skipped[2][1]
    assert "4 broken records" in caplog.text


@pytest.mark.parametrize(
    ("offset", "limit", "ids"),
    [(0, None, "abc"), (1, None, "bc"), (0, 2, "ab"), (1, 1, "b"), (2, 9, "c"), (0, 1, "a")],
)
def test_limit_and_offset_count_valid_records(mixed: str, offset: int, limit: int | None, ids: str) -> None:
    requests, _ = load_requests("file", mixed, limit, offset, on_error="skip")
    assert "".join(r.id for r in requests) == ids


def test_nothing_behind_the_limit_is_read(mixed: str) -> None:
    requests, skipped = load_requests("file", mixed, limit=1)  # line 2 is broken
    assert [r.id for r in requests] == ["a"]
    assert skipped == []


@pytest.mark.parametrize("offset", [3, 100])
def test_nothing_left_is_an_error_that_counts_what_was_left_out(mixed: str, offset: int) -> None:
    with pytest.raises(DataError, match="no edits to make; 4 broken records left out, the first: "):
        load_requests("file", mixed, offset=offset, on_error="skip")


def test_an_unreadable_file_is_not_skipped(tmp_path: Path) -> None:
    path = tmp_path / "edits.json"
    path.write_text('[\n{"prompt": ', "utf-8")
    with pytest.raises(DataError, match=rf"{path}:2: bad JSON"):
        load_requests("file", str(path), on_error="skip")


def test_only_three_columns_are_needed_and_json_jsonl_and_csv_agree(tmp_path: Path) -> None:
    rows = [fact("Italy"), fact("Peru")]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.csv").write_text(
        "prompt,subject,target_new\nThe capital of Italy is,Italy,Vienna\nThe capital of Peru is,Peru,Vienna\n"
    )
    read = {kind: load_requests("file", str(tmp_path / f"a.{kind}"))[0] for kind in ("json", "jsonl", "csv")}
    assert read["json"] == read["jsonl"] == read["csv"]
    assert [(r.id, r.text, r.target_new) for r in read["csv"]] == [
        ("fact-1", "The capital of Italy is", "Vienna"),
        ("fact-2", "The capital of Peru is", "Vienna"),
    ]


def test_csv_with_all_optional_columns_equals_json(tmp_path: Path) -> None:
    full = fact(
        "Italy",
        id="x",
        relation="capital",
        target_true="Rome",
        paraphrases=["Italy's capital is", "Italy is governed from"],
        neighborhood=[{"prompt": "The capital of Peru is", "answer": "Lima"}],
        generation=["Italy's capital"],
    )
    (tmp_path / "a.json").write_text(json.dumps([full]))
    (tmp_path / "a.csv").write_text(
        "id,relation,prompt,subject,target_new,target_true,paraphrases,neighborhood,generation\n"
        "x,capital,The capital of Italy is,Italy,Vienna,Rome,Italy's capital is|Italy is governed from,"
        "The capital of Peru is => Lima,Italy's capital\n"
    )
    from_csv, from_json = (load_requests("file", str(tmp_path / f"a.{kind}"))[0] for kind in ("csv", "json"))
    assert from_csv == from_json
    assert from_csv[0].neighborhood[0].answer == "Lima"


def test_hub_source_reads_a_local_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [fact("Italy", id="x"), fact("Peru", id=None), fact("Chad", id=None)])
    requests, skipped = load_requests("hub", str(folder))
    assert [(r.id, r.subject) for r in requests] == [("x", "Italy"), ("fact-2", "Peru"), ("fact-3", "Chad")]
    assert skipped == []
    with pytest.raises(DataError, match=r"split 'nowhere'\) cannot be loaded"):
        load_requests("hub", str(folder), split="nowhere")


def test_a_hub_data_set_that_is_not_there_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be loaded"):
        load_requests("hub", str(tmp_path / "absent"))


@pytest.mark.parametrize("source", ["file", "hub", "zsre", "counterfact"])
def test_a_source_without_its_path_says_what_it_needs(source: Any) -> None:
    with pytest.raises(DataError, match=r"needs data\.path"):
        load_requests(source)


def test_built_in_facts_take_no_path() -> None:
    with pytest.raises(DataError, match=r"needs data\.source=file"):
        load_requests("builtin", "mine.csv")


def test_a_named_format_is_used_as_such(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [fact("Italy")])
    with pytest.raises(DataError, match=r":1: missing field alt|:1: missing field src"):
        load_requests("zsre", path)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    "prompt",
    "subject",
    "target_new",
    "target_true",
    "id",
    "case_id",
    "paraphrases",
    "neighborhood",
    "portability",
    "generation",
    "relation",
    "src",
    "alt",
    "answers",
    "loc",
    "loc_ans",
    "rephrase",
    "rephrase_prompt",
    "locality_prompt",
    "locality_ground_truth",
    "ground_truth",
    "requested_rewrite",
    "paraphrase_prompts",
    "neighborhood_prompts",
    "generation_prompts",
    "locality",
    "references",
    "target_id",
]


@FUZZ
@given(broken=st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=6), drop=st.sampled_from(["", *FIELDS]))
def test_records_of_any_json_values_raise_nothing_but_data_errors(
    tmp_path: Path, broken: dict[str, Any], drop: str
) -> None:
    record = {k: v for k, v in {**fact("Italy"), **broken}.items() if k != drop}
    path = write_jsonl(tmp_path / "fuzz.jsonl", [record, fact("a good one at the end", id="good")])
    requests, skipped = load_requests("file", path, on_error="skip")
    assert len(requests) + len(skipped) == 2
    assert all(isinstance(r, EditRequest) and "\ud800" not in r.text for r in requests)
    assert all(place.startswith(path) for place, _ in skipped)


@FUZZ
@given(content=st.binary(max_size=120), kind=st.sampled_from(["json", "jsonl", "csv"]))
def test_random_files_raise_nothing_but_data_errors(tmp_path: Path, content: bytes, kind: str) -> None:
    path = tmp_path / f"fuzz.{kind}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=str(path)):  # random bytes are no edits
        load_requests("file", str(path), on_error="skip")


def test_counterfact_is_read_completely(shared_data: Path) -> None:
    requests, skipped = load_requests("file", str(shared_data / "counterfact_2000.json"))
    assert (len(requests), skipped) == (2000, [])
    raw = json.loads((shared_data / "counterfact_2000.json").read_text("utf-8"))
    for request, record in zip(requests, raw, strict=True):
        assert request.text == record["prompt"].strip()
        assert request.text[slice(*request.subject_span)] == record["subject"].strip()
        assert (request.id, request.target_new) == (str(record["case_id"]), record["target_new"])
        assert request.target_true == record["ground_truth"]
        assert len(request.paraphrases) == len(request.neighborhood) == 1


def test_zsre_is_read_completely_with_its_question_marks(shared_data: Path) -> None:
    requests, skipped = load_requests("zsre", str(shared_data / "zsre_500.json"))
    assert (len(requests), skipped) == (500, [])
    raw = json.loads((shared_data / "zsre_500.json").read_text("utf-8"))
    for request, record in zip(requests, raw, strict=True):
        assert (request.text, request.target_new) == (record["src"].strip(), record["alt"].strip())
        (probe,) = request.neighborhood
        assert probe.prompt == record["loc"].strip().rstrip("?") + "?"
        assert probe.answer == record["loc_ans"].strip()
