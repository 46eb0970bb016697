"""What a run sends to wandb, read back from the offline file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lit_edit.cli import main
from tests.test_cli import FAST
from tests.wandb_files import read_run


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_EDIT_CACHE", str(folder / "cache"))
        patch.delenv("WANDB_MODE")
        patch.chdir(folder)
        args = [
            "fit",
            "--config",
            "quickstart",
            "--trainer.logger",
            "wandb",
            f"--model.language_model.name={tiny_folder}",
        ]
        assert main([*args, *FAST, "--data.limit=3", "--run_name=w", "--trainer.accelerator=cpu"]) == 0
    import wandb

    wandb.finish()
    return read_run(folder / "runs" / "w")


def test_curves_have_the_edit_count_as_axis(run: dict[str, Any]) -> None:
    rows = [row for row in run["history"] if "edit/target_probability" in row]
    assert [row["trainer/global_step"] for row in rows] == [1, 2, 3]
    norms = [row for row in run["history"] if any(name.startswith("norm/") for name in row)]
    assert {row["trainer/global_step"] for row in norms} == {0, 1, 2, 3}
    (final,) = [row for row in run["history"] if "final/efficacy/success" in row]
    assert final["trainer/global_step"] == 3


def test_the_config_is_there(run: dict[str, Any]) -> None:
    assert run["config"]["model"]["editor"]["class_path"] == "lit_edit.editors.D4S"
    assert run["config"]["data"]["limit"] == 3


def test_edits_and_figures_are_there(run: dict[str, Any]) -> None:
    names = {name for row in run["history"] for name in row}
    assert any(name.startswith("edits") for name in names)
    assert {f"figures/{name}" for name in ("metrics", "l1_norms", "forgetting")} <= {
        n.rpartition("/_")[0] or n for n in names
    }
    assert sum(path.endswith(".png") for path in run["files"]) == 3
