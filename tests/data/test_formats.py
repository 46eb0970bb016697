"""A record format is one file of ``lit_edit/data/formats``: it is found, and asked in the right order."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lit_edit.data import formats
from lit_edit.data.request import DataError

PAIRS = '''"""Two edits in a record: ``pair[{prompt, subject, target_new}]``."""

from lit_edit.data.request import EditRequest

BEFORE = ("zsre",)


def recognises(record):
    return "pair" in record


def read(record, number):
    return [EditRequest.from_text(id=f"{number}/{i}", **one) for i, one in enumerate(record["pair"])]
'''
PAIR = [{"prompt": f"The capital of {name} is", "subject": name, "target_new": "Vienna"} for name in ("Italy", "Peru")]


def test_each_format_says_its_fields_and_comes_before_those_that_take_its_records() -> None:
    names = list(formats._BY_NAME)
    assert set(names) == {"counterfact", "counterfact_flat", "zsre", "facts"}
    for name, module in formats._BY_NAME.items():
        assert "``" in module.__doc__, f"{name} does not name its fields"
        assert all(names.index(later) > names.index(name) for later in getattr(module, "BEFORE", ()))
    assert names[-1] == "facts"  # which takes all


def test_a_new_format_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pairs.py").write_text(PAIRS)
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path)])
    found = formats._in_order()
    monkeypatch.delitem(sys.modules, "lit_edit.data.formats.pairs")
    assert list(found).index("pairs") < list(found).index("zsre")
    monkeypatch.setattr(formats, "_BY_NAME", found)
    record = {"pair": PAIR, "src": "not a question of zsRE"}
    assert [request.id for request in formats.read_record(record, 3)] == ["3/0", "3/1"]
    with pytest.raises(DataError, match="expected a record of one edit, got 2 edits in it"):
        formats.parse_record(record, 3)
    with pytest.raises(DataError, match="alt"):
        formats.read_record(record, 3, "zsre")
