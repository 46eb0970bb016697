"""Disks that fill up, folders that cannot be written, files that are damaged."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_edit.cli.main import main
from lit_edit.ledger.journal import Journal
from lit_edit.loggers.run_csv import RunCSVLogger
from lit_edit.runs.files import deltas_path, journal_path
from lit_edit.stream.edit_stream import EditStream
from tests.runs.life import contents, same_as


def no_space(*args: object, **options: object) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device", "somewhere")


def fill_journal(patch: pytest.MonkeyPatch) -> None:
    append = Journal.append

    def full(journal: Journal, record: Any, tensors: Any = None) -> int:
        return no_space() if len(journal) == 3 else append(journal, record, tensors)

    patch.setattr(Journal, "append", full)


def fill_checkpoints(patch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"a part")
        no_space()

    patch.setattr("lit_edit.files.tensor_files.save_file", full)


def fill_logs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RunCSVLogger, "_append", no_space)


def fill_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("lit_edit.export.model.save_deltas", no_space)


@pytest.mark.parametrize("fill", [fill_journal, fill_checkpoints, fill_logs, fill_end])
def test_a_full_disk_ends_the_run_in_a_sentence_and_it_goes_on_later(
    fill: Callable[..., None], runs: Path, fit: Any, whole: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fill(patch)
        assert fit("--run_name=x") == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line.lower()]
    assert len(errors) == 1
    assert errors[0].startswith("lit-edit: error: the disk is full")
    assert list(runs.rglob("*.part")) == []
    assert fit("--run_name=x", "--resume=auto") == 0
    assert same_as(runs / "x", whole) == []


@pytest.mark.parametrize("where", ["runs", "runs/x", "runs/x/ledger"])
def test_a_file_where_a_folder_should_be(where: str, runs: Path, fit: Any, capsys: Any) -> None:
    place = runs.parent / where
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("in the way")
    assert fit("--run_name=x", "--resume=auto") == 2
    err = capsys.readouterr().err
    assert "lit-edit: error:" in err
    assert "Traceback" not in err
    assert place.read_text() == "in the way"


@pytest.mark.parametrize("command", ["fit", "undo"])
def test_a_run_folder_that_cannot_be_written(
    command: str, killed: Path, fit: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def read_only(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if str(path).startswith(str(killed)) and flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, flags, *args, **options)

    before = contents(killed)
    monkeypatch.setattr(os, "open", read_only)
    status = fit("--run_name=x", "--resume=auto") if command == "fit" else main(["undo", f"--run={killed}", "--last=1"])
    assert status == 2
    err = capsys.readouterr().err
    assert f"{killed} cannot be written: Read-only file system" in err
    assert contents(killed) == before


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_last_bit(path: Path) -> None:
    """Change one bit of a file's last tensor."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage", ["the newest", "a bit of the newest", "all", "a bit of all", "gone", "of another run"]
)
def test_a_damaged_checkpoint_is_not_needed(
    damage: str, killed: Path, fit: Any, whole: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = killed / "checkpoints"
    checkpoints = sorted(folder.glob("epoch*.ckpt"))
    assert len(checkpoints) == 2  # the third edit is in the journal alone
    if damage == "gone":
        shutil.rmtree(folder)
    elif damage == "of another run":
        shutil.copy(whole / "checkpoints" / "epoch=0-step=4.ckpt", folder / "epoch=0-step=9.ckpt")
    else:
        for path in checkpoints[-1:] if damage.endswith("the newest") else checkpoints:
            (flip_last_bit if "bit" in damage else cut_in_half)(path)
    used: list[int] = []
    restore = EditStream.restore
    monkeypatch.setattr(
        EditStream,
        "restore",
        lambda stream, saved: (used.append(len(saved["results"]["immediate"])), restore(stream, saved)),
    )
    with caplog.at_level(logging.WARNING):
        assert fit("--run_name=x", "--resume=auto") == 0
    assert used == {"newest": [1], "all": [], "gone": [], "run": [2]}[damage.split()[-1]]
    assert ("is damaged and not used" in caplog.text) == damage.endswith(("the newest", "all"))
    assert (f"{checkpoints[-1]} is damaged" in caplog.text) == damage.endswith(("the newest", "all"))
    assert ("is not what was written: bits have changed" in caplog.text) == ("bit" in damage)
    assert same_as(killed, whole) == []


@pytest.mark.parametrize("damage", ["cut", "flipped", "zeros"])
@pytest.mark.parametrize("records", [0, 1])
def test_a_journal_with_a_damaged_end_is_recovered(
    damage: str, records: int, killed: Path, fit: Any, whole: Path
) -> None:
    """Also where a checkpoint knows of an edit that the journal has lost: an older one is used, the edit made again."""
    path = journal_path(killed)
    if records:  # the file ends with the second edit, which the newest checkpoint has
        journal = Journal(path)
        journal._cut(journal._places[-2].offset + journal._places[-2].length)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[-100:]
    elif damage == "flipped":
        data[-100] ^= 1
    else:
        data[-2000:] = b"\0" * 2000
    path.write_bytes(data)
    assert fit("--run_name=x", "--resume=auto") == 0
    assert same_as(killed, whole) == []


def damage_middle(folder: Path) -> bytes:
    """Damage the second record, and return the file."""
    journal = Journal(journal_path(folder), writable=False)
    data = bytearray(journal.as_bytes())
    data[journal._places[1].offset + 50] ^= 1
    journal_path(folder).write_bytes(data)
    return bytes(data)


@pytest.mark.parametrize("end", ["killed", "finished"])
def test_a_journal_damaged_in_its_middle_is_repaired_by_resume_alone(
    end: str, request: pytest.FixtureRequest, fit: Any, whole: Path, capsys: Any
) -> None:
    folder: Path = request.getfixturevalue(end)
    damaged = damage_middle(folder)
    for args in (["log"], ["undo", "--last=1"], ["redo", "--edit=1"]):
        assert main([*args, f"--run={folder}"]) == 2
        assert "record 2 (at byte" in capsys.readouterr().err
    assert journal_path(folder).read_bytes() == damaged
    assert fit("--run_name=x", "--resume=auto") == 0
    assert same_as(folder, whole) == []
    aside = journal_path(folder).with_name("journal.damaged").read_bytes()
    assert damaged.endswith(aside)
    assert len(aside) > 1000


def test_a_journal_that_is_none_is_refused(killed: Path, fit: Any, capsys: Any) -> None:
    journal_path(killed).write_bytes(b"my diary")
    for command in (lambda: fit("--run_name=x", "--resume=auto"), lambda: main(["log", f"--run={killed}"])):
        assert command() == 2
        assert "is not a journal of lit-edit" in capsys.readouterr().err
    assert journal_path(killed).read_bytes() == b"my diary"


@pytest.mark.parametrize("damage", ["half", "bit", "not finite"])
def test_damaged_key_statistics_are_computed_anew(
    damage: str, killed: Path, fit: Any, whole: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Path(shutil.copytree(shared / "cache", tmp_path / "cache"))
    monkeypatch.setenv("LIT_EDIT_CACHE", str(cache))
    files = sorted(cache.rglob("layer*.safetensors"))
    assert len(files) == 2
    good = load_file(files[0])["moment"].clone()  # not the file itself, which is damaged now
    if damage in ("half", "bit"):
        {"half": cut_in_half, "bit": flip_last_bit}[damage](files[0])
    else:
        save_file({"moment": good * torch.nan}, files[0])
    assert fit("--run_name=x", "--resume=auto") == 0
    assert same_as(killed, whole) == []
    assert torch.equal(load_file(files[0])["moment"], good)


@pytest.mark.parametrize("damage", ["half", "bit", "gone"])
def test_damaged_updates_are_written_anew_from_the_journal(damage: str, finished: Path, whole: Path) -> None:
    path = deltas_path(finished)
    {"half": cut_in_half, "bit": flip_last_bit, "gone": Path.unlink}[damage](path)
    assert main(["ask", f"--run={finished}", "Hello there", "--tokens=1"]) == 0
    assert same_as(finished, whole) in ([], ["edits"])  # whose last marks are not measured again
    assert load_file(path).keys() == load_file(deltas_path(whole)).keys()
