"""Files of records: every record has its line, and whatever cannot be read is named with file and line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_edit.data.files import read_file
from lit_edit.data.request import DataError

FUZZ = settings(
    max_examples=80, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
RECORDS = [
    {"prompt": f"The capital of {c} is", "subject": c, "target_new": "Vienna"} for c in ("Italy", "Peru", "Chad")
]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def as_text(kind: str, records: list[dict[str, str]]) -> str:
    if kind == "json":
        return json.dumps(records, indent=1)
    if kind == "jsonl":
        return "".join(json.dumps(record) + "\n" for record in records)
    rows = [",".join(records[0]), *(",".join(record.values()) for record in records)]
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "JSON", "Csv"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_every_format_yields_the_same_records(tmp_path: Path, kind: str, newline: str, bom: bytes) -> None:
    text = as_text(kind.lower(), RECORDS).replace("\n", newline)
    path = write(tmp_path / f"edits.{kind}", bom + text.encode())
    assert [record for _, record in read_file(path)] == RECORDS


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("a.json", '[\n {"a": 1},\n\n {"a":\n  2}, {"a": 3}\n]', [2, 4, 5]),
        ("a.jsonl", '{"a": 1}\n\n  \n{"a": 2}\n{"a": 3}', [1, 4, 5]),
        ("a.csv", 'a,b\n1,2\n\n"3\n4",5\n6,7\n', [2, 4, 6]),
    ],
)
def test_each_record_has_its_line(tmp_path: Path, name: str, text: str, lines: list[int]) -> None:
    found = [line for line, _ in read_file(write(tmp_path / name, text))]
    assert found == lines


def test_csv_keeps_commas_quotes_and_line_breaks_and_drops_empty_cells(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", ' prompt , subject,target_new,id\n"a ""b"", c","x\ny",z,\n,only\n')
    assert [r for _, r in read_file(path)] == [
        {"prompt": 'a "b", c', "subject": "x\ny", "target_new": "z"},
        {"subject": "only"},
    ]


def test_jsonl_survives_unicode_line_separators_inside_texts(tmp_path: Path) -> None:
    record = {"prompt": "one\u2028two\u0085three"}
    assert [r for _, r in read_file(write(tmp_path / "a.jsonl", json.dumps(record, ensure_ascii=False)))] == [record]


@pytest.mark.parametrize("text", ["[]", " [ ] \n", "[\n]"])
def test_an_empty_list_holds_no_records(tmp_path: Path, text: str) -> None:
    assert list(read_file(write(tmp_path / "a.json", text))) == []


@pytest.mark.parametrize(
    ("name", "content", "line", "what"),
    [
        ("a.json", '{"a": 1}', 1, "expected a JSON list"),
        ("a.json", "", 1, "expected a JSON list"),
        ("a.json", '\n\n"text"', 3, "expected a JSON list"),
        ("a.json", '[\n{"a": 1},\n{"a": }\n]', 3, "bad JSON"),
        ("a.json", '[\n{"a": 1}\n{"a": 2}\n]', 3, "expected ',' or ']'"),
        ("a.json", '[\n{"a": 1},\n{"a": 2},\n]', 4, "bad JSON"),
        ("a.json", '[\n{"a": 1},\n{"a": "tru', 3, "bad JSON"),
        ("a.json", '[\n{"a": 1},\n{"a": 2}', 3, "expected ',' or ']'"),
        ("a.json", "[", 1, "bad JSON"),
        ("a.json", '[\n{"a": 1}\n]\n]', 4, "after the end"),
        ("a.json", '[\n{"a": 1},\n{"a": NaN}\n]', 3, "NaN is not JSON"),
        ("a.json", '[\n{"a": -Infinity}\n]', 2, "-Infinity is not JSON"),
        ("a.json", "[\n" + "[" * 100_000, 2, "bad JSON"),
        ("a.json", '[\n{"a": ' + "9" * 5000 + "}\n]", 2, "bad JSON"),
        ("a.json", b'[\n{"a": "caf\xe9"}\n]', 2, "not UTF-8"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": "\xff"}', 3, "not UTF-8"),
        ("a.csv", b"a,b\n1,\xe4\n", 2, "not UTF-8"),
        ("a.csv", "", 1, "empty"),
        ("a.csv", "\n\n", 1, "empty"),
        ("a.csv", "a,b, a\n1,2,3\n", 1, "occurs twice"),
        ("a.csv", 'a,b\n1,2\n"3"x,4\n', 3, "bad CSV"),
        ("a.csv", 'a,b\n1,"2\n', 2, "bad CSV"),
        ("a.csv", "a,b\n1," + "x" * 200_000 + "\n", 2, "bad CSV"),
    ],
)
def test_a_file_that_cannot_be_read_names_file_line_and_reason(
    tmp_path: Path, name: str, content: str | bytes, line: int, what: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        list(read_file(path))
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert what in str(caught.value)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ('{"a": ', "Expecting value"),
        ('{"a": 1} {"a": 2}', "Extra data"),
        ("{'a': 1}", "property name"),
        ('{"a": NaN}', "NaN is not JSON"),
        ("[" * 100_000, "bad JSON"),
        ("9" * 5000, "bad JSON"),
    ],
)
def test_a_broken_line_of_jsonl_is_an_error_of_its_own(tmp_path: Path, row: str, what: str) -> None:
    rows = list(read_file(write(tmp_path / "a.jsonl", f'{{"a": 1}}\n{row}\n{{"a": 3}}\n')))
    assert [line for line, _ in rows] == [1, 2, 3]
    assert rows[0][1] == {"a": 1}
    assert rows[2][1] == {"a": 3}
    assert isinstance(rows[1][1], DataError)
    assert what in str(rows[1][1])


def test_a_csv_row_with_too_many_cells_is_an_error_of_its_own(tmp_path: Path) -> None:
    rows = list(read_file(write(tmp_path / "a.csv", "a,b\n1,2\n1,2,3\n4,5\n")))
    assert [line for line, _ in rows] == [2, 3, 4]
    assert isinstance(rows[1][1], DataError)
    assert "more cells" in str(rows[1][1])
    assert rows[2][1] == {"a": "4", "b": "5"}


@pytest.mark.parametrize(
    ("name", "what"), [("absent.json", "no such file"), ("a.parquet", "unknown kind"), ("a", "unknown kind")]
)
def test_a_wrong_path_says_so(tmp_path: Path, name: str, what: str) -> None:
    with pytest.raises(DataError, match=what):
        list(read_file(tmp_path / name))


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder"):
        list(read_file(tmp_path))


def read_all(path: Path) -> int:
    try:
        return len(list(read_file(path)))
    except DataError as error:
        assert str(path) in str(error)  # noqa: PT017 - the point is that nothing else comes out
        return -1


@FUZZ
@given(content=st.binary(max_size=200), kind=st.sampled_from(["json", "jsonl", "csv"]))
def test_random_bytes_raise_nothing_but_data_errors(tmp_path: Path, content: bytes, kind: str) -> None:
    read_all(write(tmp_path / f"fuzz.{kind}", content))


@FUZZ
@given(data=st.data(), kind=st.sampled_from(["json", "jsonl", "csv"]))
def test_mutated_files_raise_nothing_but_data_errors(tmp_path: Path, data: st.DataObject, kind: str) -> None:
    raw = bytearray(as_text(kind, RECORDS).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(
            st.sampled_from([b"", b'"', b"{", b"]", b",", b"\n", b"\\", b"\x00", b"\xff", b"NaN", b"\\ud800"])
        )
    read_all(write(tmp_path / f"fuzz.{kind}", bytes(raw)))


@FUZZ
@given(
    st.lists(
        st.lists(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00\r"), min_size=1),
            min_size=2,
            max_size=2,
        )
    )
)
def test_whatever_a_csv_writer_writes_is_read_back(tmp_path: Path, rows: list[list[str]]) -> None:
    path = tmp_path / "round.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["a", "b"], *rows])
    assert [record for _, record in read_file(path)] == [{"a": a, "b": b} for a, b in rows]
