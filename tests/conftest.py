"""What all tests share."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

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

# What `pytest -m fast` runs: the examples of the docstrings, and of these folders all but what is slow or loads the
# real model. They compute, and start no processes; together they take three minutes of one core.
FAST = {"data", "editors", "files", "ledger", "metrics", "models", "parity", "solvers", "stats", "targets", "text"}


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder, below, *_ = item.path.relative_to(ROOT).parts
        if (folder == "lit_edit" or below in FAST) and not {"slow", "model"} & {m.name for m in item.iter_markers()}:
            item.add_marker("fast")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import no tests but the fast ones where nothing else is asked for."""
    below = collection_path.relative_to(ROOT / "tests").parts
    return True if config.option.markexpr == "fast" and below and below[0] not in FAST else None


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


def script_of_docs(name: str) -> ModuleType:
    """Return a script of ``docs/``, which makes a page or a file, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
