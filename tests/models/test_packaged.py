"""Models in several wheels, and models with terms of use: joined and checked; fetched once the terms are accepted."""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lit_edit.cli.main import ACCEPT, main
from lit_edit.models import packaged
from lit_edit.models.packaged import ACCEPTED, PACKAGED, ModelUnavailableError, PackagedParts, fetch

PARTS = (b"the first half, ", b"and the second")


class Terminal(io.StringIO):
    """Somebody who sits there and types."""

    def isatty(self) -> bool:
        return True


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def parted(
    tmp_path: Path, tiny_folder: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[PackagedParts, list[str]]:
    """A model in two wheels that pip, as played here, brings; and what pip was asked for."""
    wheels = {}
    for number, data in enumerate(PARTS, 1):
        path = tmp_path / f"tiny_part{number}-1-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"tiny_part{number}/__init__.py", "raise SystemExit('run')")
            archive.writestr(f"tiny_part{number}/data/tiny.part{number}", data)
        wheels[path] = sha(path.read_bytes())
    asked: list[str] = []

    def pip(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert "--require-hashes" in command
        asked.extend(Path(command[-1]).read_text().splitlines())
        for path in wheels:
            shutil.copy(path, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0)

    def convert(gguf: Path, target: Path) -> None:
        assert gguf.read_bytes() == b"".join(PARTS)
        shutil.copytree(tiny_folder, target)

    monkeypatch.setattr("subprocess.run", pip)
    monkeypatch.setattr(packaged, "_convert", convert)
    monkeypatch.setenv(ACCEPTED, "")  # and what a command sets is gone after the test
    first, second = wheels.values()
    model = PackagedParts(
        name="tiny",
        title="Tiny",
        package="tiny-part1==1",
        wheel_sha256=first,
        more={"tiny-part2==1": second},
        parts={f"tiny_part{n}/data/tiny.part{n}": sha(data) for n, data in enumerate(PARTS, 1)},
        member="tiny.gguf",
        member_sha256=sha(b"".join(PARTS)),
        licence="terms of the tiny",
        terms="https://example.org/terms",
        size="1 kB",
    )
    monkeypatch.setitem(PACKAGED, "tiny", model)
    return model, asked


def test_terms_are_shown_and_nothing_is_fetched_before_they_are_accepted(
    parted: tuple[PackagedParts, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = parted
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))  # a pipe is nobody who reads
    for names in ("", "another", "tiny2"):
        monkeypatch.setenv(ACCEPTED, names)
        with pytest.raises(ModelUnavailableError, match=r"https://example\.org/terms.*--accept-licence"):
            fetch(model)
    assert not asked
    assert not model.is_cached


@pytest.mark.parametrize("names", ["tiny", "other, tiny", "all"])
def test_parts_are_joined_and_checked(
    names: str, parted: tuple[PackagedParts, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = parted
    monkeypatch.setenv(ACCEPTED, names)
    assert fetch(model) == model.folder
    assert [line.split(" --hash")[0] for line in asked] == ["tiny-part1==1", "tiny-part2==1"]
    assert model.is_cached
    assert not list(model.folder.rglob("*.part*"))
    monkeypatch.delenv(ACCEPTED)  # whoever has it has accepted
    monkeypatch.setattr("subprocess.run", lambda *args, **options: pytest.fail("tried to download"))
    assert fetch(model) == model.folder


@pytest.mark.parametrize(("typed", "accepted"), [("y\n", True), ("Yes\n", True), ("n\n", False), ("", False)])
def test_whoever_sits_there_is_asked(
    typed: str, accepted: bool, parted: tuple[PackagedParts, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = parted
    screen = Terminal()
    monkeypatch.setattr(sys, "stdin", Terminal(typed))
    monkeypatch.setattr(sys, "stderr", screen)
    if accepted:
        fetch(model)
    else:
        with pytest.raises(ModelUnavailableError, match="once you accept"):
            fetch(model)
    assert model.is_cached is accepted
    assert "https://example.org/terms\nHave you read them" in screen.getvalue()


def test_other_files_than_expected_are_refused(
    parted: tuple[PackagedParts, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = parted
    monkeypatch.setenv(ACCEPTED, "tiny")
    other = dict.fromkeys(model.parts, "0" * 64)
    missing = {**model.parts, "tiny_part2/data/tiny.part3": "0" * 64}
    for wrong, told in (
        (replace(model, parts=other), r"tiny\.part1 is not the file it should be"),
        (replace(model, parts=missing), r"holds no tiny_part2/data/tiny\.part3"),
        (replace(model, member_sha256="0" * 64), r"tiny\.gguf is not the file it should be"),
        (replace(model, more={"tiny-part2==1": "0" * 64}), r"\.whl is not the file it should be"),
        (replace(model, more={}), "could not be downloaded"),
    ):
        with pytest.raises(ModelUnavailableError, match=told):
            fetch(wrong)
        assert not wrong.is_cached
        assert [path for path in (wrong.folder.parent).iterdir() if path.suffix != ".lock"] == []


def test_every_command_takes_the_acceptance(
    parted: tuple[PackagedParts, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    model, _ = parted
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    words = ["stats", "--model=tiny", "--layers", "1", "--tokens=64"]
    assert main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main([*words, ACCEPT]) == 0
    assert model.is_cached


def test_packaged_models_are_whole() -> None:
    for name, model in PACKAGED.items():
        assert model.name == name
        digests = [model.wheel_sha256, *model.more.values(), *model.files.values(), model.member_sha256]
        assert all(len(digest) == 64 for digest in digests)
        assert len(set(digests)) >= len(digests) - 1  # a model in one piece is its own file
    assert PACKAGED["gemma3-270m"].member_sha256.startswith("a5fd3b62230aa5ec")
