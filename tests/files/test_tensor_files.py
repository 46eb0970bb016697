"""Tensors on disk: what the system refuses comes as the error it is."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open

from lit_edit.files.tensor_files import save_tensors, system_errors


def test_tensors_come_back(tmp_path: Path) -> None:
    value = torch.arange(6.0).reshape(2, 3)
    save_tensors({"a": value}, tmp_path / "x", {"of": "test"})
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"of": "test"}
        assert torch.equal(file.get_tensor("a"), value)


def test_a_missing_folder_is_an_error_of_the_system(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "x"
    with pytest.raises(OSError, match="No such file") as caught:
        save_tensors({"a": torch.zeros(2)}, path)
    assert caught.value.errno == errno.ENOENT
    assert caught.value.filename == str(path)


def test_a_disk_that_takes_no_more(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="limits on files are a matter of Unix")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            save_tensors({"a": torch.zeros(1 << 20)}, tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(SafetensorError, match="header"), system_errors(Path("x")):
        raise SafetensorError("header too large")
