"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Before transformers is imported anywhere: no test may reach a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
DEFAULT_GOLDEN = os.environ.get("LIT_EDIT_GOLDEN", str(SHARED / "golden"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        default=DEFAULT_GOLDEN,
        help="folder of reference results for tests/parity (layout: its README)",
    )


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, so that nothing is found that another test left."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("LIT_EDIT_CACHE", str(cache))
    return cache


@pytest.fixture(autouse=True)
def _leave_torch_alone() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(True)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real benchmark data, which does not belong to the repository."""
    folder = Path(os.environ.get("LIT_EDIT_DATA", SHARED / "data"))
    if not folder.is_dir():
        pytest.skip(f"no benchmark data at {folder}; point LIT_EDIT_DATA at it")
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with its tokenizer, as a folder on disk."""
    from lit_edit.testing import tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
