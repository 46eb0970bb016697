"""Writing files so that no reader ever sees half of one."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_edit.files.paths import cache_dir, write_atomically, write_json


def fail(path: Path) -> None:
    path.write_text("half")
    raise OSError("disk full")


def interrupt(path: Path) -> None:
    path.write_text("half")
    raise KeyboardInterrupt


@pytest.mark.parametrize(("write", "error"), [(fail, OSError), (interrupt, KeyboardInterrupt)])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, write: Callable[[Path], None], error: type[BaseException]
) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(error):
        write_atomically(target, write)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("write", [fail])
def test_a_failure_on_a_new_file_leaves_nothing(tmp_path: Path, write: Callable[[Path], None]) -> None:
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "sub" / "a.txt", write)
    assert list((tmp_path / "sub").iterdir()) == []


def test_the_file_appears_complete_with_ordinary_permissions(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.txt"
    during: list[bool] = []

    def write(path: Path) -> None:
        path.write_text("new")
        during.append(target.exists())
        assert path.parent == target.parent  # the same file system: the last step cannot be half done

    old = os.umask(0o027)
    try:
        write_atomically(target, write)
    finally:
        os.umask(old)
    assert (target.read_text(), during) == ("new", [False])
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert list(target.parent.iterdir()) == [target]


def test_json_is_strict_readable_and_atomic(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_json(target, {"Zürich": [1, None]})
    assert "Zürich" in target.read_text("utf-8")
    assert json.loads(target.read_text("utf-8")) == {"Zürich": [1, None]}
    for bad in (float("nan"), float("inf"), object()):
        with pytest.raises((ValueError, TypeError)):
            write_json(target, {"x": bad})
    assert json.loads(target.read_text("utf-8")) == {"Zürich": [1, None]}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"LIT_EDIT_CACHE": "/a/b", "XDG_CACHE_HOME": "/c"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/lit-edit"),
        ({"HOME": "/h"}, "/h/.cache/lit-edit"),
        ({"HOME": "/h", "LIT_EDIT_CACHE": "~/x"}, "/h/x"),
        ({"HOME": "/h", "LIT_EDIT_CACHE": "", "XDG_CACHE_HOME": ""}, "/h/.cache/lit-edit"),
    ],
)
def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, environment: dict[str, Any], expected: str) -> None:
    for name in ("LIT_EDIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(expected)
