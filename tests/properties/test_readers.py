"""Readers: whatever is written in any of the forms is read back, and bytes of any kind raise nothing but DataErrors."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lit_edit.data.request import DataError, EditRequest, Probe, find_fault
from lit_edit.data.sources import load_requests

MANY = settings(
    max_examples=60,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=10)
WORDS = TEXT.map(str.strip).filter(bool)
CELL = WORDS.filter(lambda text: "|" not in text and "=>" not in text)  # what parts lists in CSV


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """A line about what was left out, for each of a thousand files, helps nobody."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    yield
    logging.disable(before)


@st.composite
def requests(draw: st.DrawFn, words: st.SearchStrategy[str] = WORDS, most: int = 2) -> list[EditRequest]:
    """Valid requests with ids of their own.

    Args:
        draw: By hypothesis.
        words: Texts of lists and probes.
        most: Paraphrases and neighbours of each, at most.
    """
    probes = st.lists(st.builds(Probe, words, words), max_size=most).map(tuple)
    made = []
    for id in draw(st.lists(WORDS, min_size=1, max_size=3, unique=True)):
        before, after = draw(st.just("") | TEXT), draw(st.just("") | TEXT)
        prompt = f"{before}{{}}{after}".strip()
        new = draw(WORDS)
        try:
            request = EditRequest(
                id=id,
                prompt=prompt,
                subject=draw(WORDS),
                target_new=new,
                target_true=draw(st.none() | WORDS.filter(lambda text, new=new: text != new)),  # type: ignore[misc]
                paraphrases=draw(st.lists(words, max_size=most).map(tuple)),
                neighborhood=draw(probes),
                generation=draw(st.lists(words, max_size=most).map(tuple)),
                relation=draw(st.just("") | WORDS),
            )
        except DataError:  # a second place for the subject, or a subject of braces
            request = EditRequest(id, "{} is", "Oslo", new)
        made.append(request)
    return made


def own_record(request: EditRequest) -> dict[str, Any]:
    """A request in our own form; what it lacks is left out or null."""
    return {
        "id": request.id,
        "prompt": request.prompt,
        "subject": request.subject,
        "target_new": request.target_new,
        "target_true": request.target_true,
        "paraphrases": list(request.paraphrases),
        "neighborhood": [vars(probe) for probe in request.neighborhood],
        "portability": {kind: [vars(probe) for probe in probes] for kind, probes in request.portability.items()},
        "generation": list(request.generation),
        "relation": request.relation or None,
    }


def counterfact_record(request: EditRequest) -> dict[str, Any]:
    """A request as CounterFact was published."""
    return {
        "case_id": request.id,
        "requested_rewrite": {
            "prompt": request.prompt,
            "subject": request.subject,
            "target_new": {"str": request.target_new, "id": "Q1"},
            "target_true": {"str": request.target_true, "id": "Q2"},
            "relation_id": request.relation or None,
        },
        "paraphrase_prompts": list(request.paraphrases),
        "neighborhood_prompts": [probe.prompt for probe in request.neighborhood],
        "generation_prompts": list(request.generation),
    }


def flat_record(request: EditRequest) -> dict[str, Any]:
    """A request in the flat form of EasyEdit."""
    probe = next(iter(request.neighborhood), None)
    return {
        "case_id": request.id,
        "prompt": request.prompt,
        "subject": request.subject,
        "target_new": request.target_new,
        "ground_truth": request.target_true,
        "rephrase_prompt": next(iter(request.paraphrases), None),
        "locality_prompt": probe and probe.prompt,
        "locality_ground_truth": probe and probe.answer,
    }


def zsre_record(request: EditRequest) -> dict[str, Any]:
    """A request as zsRE was prepared for MEND: the question of the probe without its mark."""
    probe = next(iter(request.neighborhood), None)
    return {
        "id": request.id,
        "src": request.prompt,
        "subject": request.subject,
        "alt": request.target_new,
        "answers": [] if request.target_true is None else [request.target_true],
        "rephrase": next(iter(request.paraphrases), None),
        "loc": probe and probe.prompt.removesuffix("?"),
        "loc_ans": probe and probe.answer,
    }


def as_counterfact(request: EditRequest) -> EditRequest:
    """What of a request CounterFact can say."""
    true = request.target_true or request.target_new + "!"
    neighborhood = tuple(Probe(probe.prompt, true) for probe in request.neighborhood)
    return changed(request, target_true=true, neighborhood=neighborhood, portability={}, target_id="Q1")


def as_flat(request: EditRequest) -> EditRequest:
    """What of a request the flat form can say."""
    return changed(request, portability={}, generation=(), relation="")


def as_zsre(request: EditRequest) -> EditRequest:
    """What of a request zsRE can say; its questions end with one mark."""
    probes = tuple(Probe(f"{p.prompt.rstrip('?')}?".strip(), p.answer) for p in request.neighborhood)
    probes = tuple(probe for probe in probes if probe.prompt.strip("?").strip() == probe.prompt[:-1])
    return changed(request, portability={}, generation=(), relation="", neighborhood=probes)


def changed(request: EditRequest, **fields: Any) -> EditRequest:
    """A copy with other fields."""
    return EditRequest(**{**vars(request), **fields})


def write(path: Path, records: list[Any]) -> str:
    """Write records as JSON or JSONL, by the suffix."""
    rows = [json.dumps(record, ensure_ascii=False) for record in records]
    text = f"[{', '.join(rows)}]" if path.suffix == ".json" else "\n".join(rows)
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


FORMS: dict[str, tuple[Callable[[EditRequest], dict[str, Any]], Callable[[EditRequest], EditRequest]]] = {
    "facts": (own_record, lambda request: request),
    "counterfact": (counterfact_record, as_counterfact),
    "counterfact_flat": (flat_record, as_flat),
    "zsre": (zsre_record, as_zsre),
}

by_suffix = pytest.mark.parametrize("suffix", ["json", "jsonl"])


@by_suffix
@MANY
@given(made=requests())
def test_our_own_form_is_read_back(tmp_path: Path, suffix: str, made: list[EditRequest]) -> None:
    path = write(tmp_path / f"edits.{suffix}", [own_record(request) for request in made])
    assert load_requests("file", path) == (made, [])


@by_suffix
@MANY
@given(made=requests(), kinds=st.dictionaries(WORDS, st.lists(st.builds(Probe, WORDS, WORDS), min_size=1), max_size=2))
def test_portability_is_read_back(
    tmp_path: Path, suffix: str, made: list[EditRequest], kinds: dict[str, list[Probe]]
) -> None:
    made = [changed(request, portability={kind: tuple(probes) for kind, probes in kinds.items()}) for request in made]
    path = write(tmp_path / f"edits.{suffix}", [own_record(request) for request in made])
    assert load_requests("facts", path) == (made, [])


@by_suffix
@pytest.mark.parametrize("form", ["counterfact", "counterfact_flat", "zsre"])
@MANY
@given(made=requests(most=1))
def test_published_forms_are_read_back(tmp_path: Path, suffix: str, form: str, made: list[EditRequest]) -> None:
    record, reduced = FORMS[form]
    made = [reduced(request) for request in made]
    path = write(tmp_path / f"edits.{suffix}", [record(request) for request in made])
    assert load_requests(form, path) == (made, [])  # type: ignore[arg-type]


@MANY
@given(made=requests(CELL))
def test_csv_is_read_back(tmp_path: Path, made: list[EditRequest]) -> None:
    file = io.StringIO(newline="")
    rows = csv.writer(file)
    rows.writerow(
        [
            "id",
            "prompt",
            "subject",
            "target_new",
            "target_true",
            "relation",
            "paraphrases",
            "generation",
            "neighborhood",
        ]
    )
    for request in made:
        probes = " | ".join(f"{probe.prompt} => {probe.answer}" for probe in request.neighborhood)
        lists = ("|".join(request.paraphrases), " | ".join(request.generation), probes)
        texts = (request.id, request.prompt, request.subject, request.target_new)
        rows.writerow([*texts, request.target_true or "", request.relation, *lists])
    path = tmp_path / "edits.csv"
    path.write_text(file.getvalue(), encoding="utf-8", newline="")
    assert load_requests("file", str(path)) == (made, [])


@MANY
@given(made=requests())
def test_a_prompt_with_the_subject_written_out_means_the_same_text(tmp_path: Path, made: list[EditRequest]) -> None:
    assume(not any("{}" in request.text for request in made))  # that would be the subject's place
    path = write(tmp_path / "edits.json", [{**own_record(request), "prompt": request.text} for request in made])
    read, _ = load_requests("file", path)
    for request, found in zip(made, read, strict=True):
        assert found.text == request.text
        assert found.text[slice(*found.subject_span)] == found.subject == request.subject


NUMBERS = (
    st.integers() | st.integers(-20, 20).map(lambda n: 10**400 + n) | st.floats(allow_nan=False, allow_infinity=False)
)


@by_suffix
@MANY
@given(number=NUMBERS)
def test_numbers_are_taken_as_they_are_written(tmp_path: Path, suffix: str, number: float) -> None:
    record = {"id": number, "prompt": "The tower was built in", "subject": "tower", "target_new": number}
    (request,), _ = load_requests("file", write(tmp_path / f"edits.{suffix}", [record]))
    assert request.id == request.target_new == str(number)


# ---- broken ones -----------------------------------------------------------------------------------------------------

BROKEN = st.sampled_from(
    [
        None,
        7,
        [],
        {},
        {"prompt": "The mayor of Oslo is", "subject": "Rome", "target_new": "Ada"},
        {"prompt": "The mayor of Oslo is", "subject": "Oslo", "target_new": ["Ada"]},
        {"prompt": "The mayor of Oslo is", "subject": "Oslo", "target_new": "a\ud800"},
        {"prompt": "The mayor of Oslo is", "subject": "Oslo", "target_new": "Ada", "neighborhood": [{"prompt": "x"}]},
        {"requested_rewrite": None},
        {"src": "Where is Oslo?", "subject": "Oslo", "alt": "", "answers": []},
    ]
)


@by_suffix
@MANY
@given(made=requests(), data=st.data())
def test_skipping_gives_the_good_ones_in_order(
    tmp_path: Path, suffix: str, made: list[EditRequest], data: st.DataObject
) -> None:
    records: list[Any] = [own_record(request) for request in made]
    count = data.draw(st.integers(1, 4))
    for _ in range(count):
        again = st.just(data.draw(st.sampled_from([own_record(request) for request in made])))
        records.insert(data.draw(st.integers(0, len(records))), data.draw(BROKEN | again))
    path = tmp_path / f"edits.{suffix}"
    rows = [json.dumps(record) for record in records]
    path.write_text("[\n" + ",\n".join(rows) + "\n]" if suffix == "json" else "\n".join(rows))
    read, skipped = load_requests("file", str(path), on_error="skip")
    assert len(skipped) == count
    assert {request.id: request for request in read} == {request.id: request for request in made}
    order = [record["id"] for record in records if isinstance(record, dict) and "id" in record]
    assert [request.id for request in read] == list(dict.fromkeys(order))
    with pytest.raises(DataError) as caught:
        load_requests("file", str(path))
    assert str(caught.value).startswith(skipped[0])  # the first of them, the same words


SPLICES = st.sampled_from(
    [b"", b'"', b"{", b"}", b"[", b"]", b",", b":", b"\n", b"\r", b"\\", b"\x00", b"\xff", b"\xef\xbb\xbf", b"NaN",
     b"\\ud800", b"{}", b"|", b"=>", b"null", b"1e999", b"9" * 5000, b"\xc3\xbc", "\u2028".encode(), b"  "]
)  # fmt: skip


@pytest.mark.parametrize("form", [*FORMS, "csv"])
@settings(MANY, max_examples=150)
@given(data=st.data())
def test_spliced_files_give_requests_or_data_errors(tmp_path: Path, form: str, data: st.DataObject) -> None:
    made = [as_counterfact(EditRequest(str(i), "The mayor of {} is", "Zürich", "Ada", "Émile")) for i in range(3)]
    if form == "csv":
        path = tmp_path / "edits.csv"
        path.write_text("id,prompt,subject,target_new\n" + "".join(f"{r.id},{r.text},{r.subject},Ada\n" for r in made))
    else:
        path = tmp_path / data.draw(st.sampled_from(["edits.json", "edits.jsonl"]))
        write(path, [FORMS[form][0](request) for request in made])
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw)))
        raw[at : at + data.draw(st.integers(0, 6))] = data.draw(SPLICES)
    path.write_bytes(bytes(raw))
    for source in ("file", "facts" if form == "csv" else form):
        read, error = outcome(source, str(path), data.draw(st.sampled_from(["raise", "skip"])))
        assert bool(read) != error.startswith(str(path))
        for request in read:
            assert request.text[slice(*request.subject_span)] == request.subject
            assert not any(find_fault(text) for text in (request.id, request.text, request.target_new))


def outcome(source: Any, path: str, on_error: Any) -> tuple[list[EditRequest], str]:
    """What is read, or the error."""
    try:
        return load_requests(source, path, on_error=on_error)[0], ""
    except DataError as error:
        return [], str(error)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
@settings(MANY, max_examples=150)
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_give_data_errors(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"edits.{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:  # bytes at random are no edits
        load_requests("file", str(path), on_error="skip")
    assert str(caught.value).startswith(str(path))
