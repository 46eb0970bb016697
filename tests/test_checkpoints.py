"""Checkpoint files appear whole, under their name, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_edit.checkpoints import AtomicCheckpointIO
from lit_edit.memory import release_free_memory
from tests.streams import make_data, make_stream, make_trainer


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint({"a": torch.arange(3)}, tmp_path / "deep" / "x.ckpt")
    loaded = AtomicCheckpointIO().load_checkpoint(tmp_path / "deep" / "x.ckpt", weights_only=True)
    assert loaded["a"].tolist() == [0, 1, 2]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x.ckpt"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": 1}, file)

    def fail(value: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint({"a": 2}, file)
    assert torch.load(file, weights_only=True) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.ckpt"]


def test_streams_write_that_way(tmp_path: Path) -> None:
    stream = make_stream()
    trainer = make_trainer(tmp_path)
    trainer.fit(stream, make_data(2))
    assert type(trainer.strategy.checkpoint_io) is AtomicCheckpointIO


def test_giving_memory_back_is_harmless() -> None:
    release_free_memory()
    release_free_memory()
