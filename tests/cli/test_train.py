"""``lit-edit fit`` of a config that trains a network: an ordinary Lightning run with a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from lit_edit.cli.main import main
from lit_edit.console.words import trains_network
from lit_edit.files.trees import load_tree


class Line(LightningModule):
    """A slope, fitted to 2.

    Args:
        start: Where it begins.
    """

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        if start < 0:
            raise ValueError(f"start must not be negative, got {start}")
        self.slope = torch.nn.Parameter(torch.tensor([start]))

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss = ((self.slope - 2) * batch).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.log("val/loss", (self.slope - 2).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.4)

    def save_network(self, path: Path) -> None:
        save_file({"slope": self.slope.detach()}, path, {"made": "here"})


class Mute(Line):
    save_network = None  # type: ignore[assignment]


class Ones(LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.ones(4, 1))  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.ones(1, 1))  # type: ignore[arg-type]


CONFIG = f"""\
train: network
model:
  class_path: {__name__}.Line
data:
  class_path: {__name__}.Ones
trainer:
  accelerator: cpu
  max_epochs: 3
  enable_progress_bar: false
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{monitor: val/loss, mode: min}}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "line.yaml"
    path.write_text(CONFIG)
    return str(path)


def fit(config: str, tmp_path: Path, *words: str) -> int:
    return main(["fit", "--config", config, "--runs_dir", str(tmp_path / "runs"), "--run_name", "line", *words])


def test_a_network_is_trained_and_kept(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(config, tmp_path) == 0
    folder = tmp_path / "runs" / "line"
    assert "network.safetensors (val/loss 0.000 at the end)" in capsys.readouterr().out.replace("\n", "")
    assert {"config.yaml", "metrics.csv", "checkpoints", "network.safetensors"} <= {p.name for p in folder.iterdir()}
    with safe_open(folder / "network.safetensors", "pt") as file:
        assert file.metadata() == {"made": "here"}
        # Each step of 0.4 takes 0.8 of what is left to 2, and the twelfth step was the best.
        assert file.get_tensor("slope").item() == pytest.approx(2 - 2 * 0.2**12, abs=1e-6)
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert "train/loss" in rows[0]
    assert len(rows) >= 12
    # The run's own config is one of this kind, and what was there is not overwritten unasked.
    assert trains_network(["--config", str(folder / "config.yaml")])
    assert fit(str(folder / "config.yaml"), tmp_path) == 2
    assert "exists; go on where it was cut with --resume auto, choose another --run_name" in capsys.readouterr().err
    assert fit(str(folder / "config.yaml"), tmp_path, "--overwrite", "true", "--model.start", "1.0") == 0


def test_what_cannot_be_trained_is_said(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["--model.start", "-1"], "start must not be negative, got -1"),
        (["--model.start", "none"], "start: expected float; got none"),
        (["--model", f"{__name__}.Mute"], "Mute says not what its network is"),
        (["--run_name", "a/b"], "must be a plain folder name"),
    ):
        assert fit(config, tmp_path, *words) == 2
        err = capsys.readouterr().err
        assert said in err
    assert not (tmp_path / "runs").exists()
    assert main(["validate", "--config", config]) == 2
    assert "a network is trained: lit-edit fit" in capsys.readouterr().err


def test_streams_are_no_networks(tmp_path: Path) -> None:
    assert not trains_network(["--config", "quickstart", "--data.limit=3"])
    other = tmp_path / "other.yaml"
    other.write_text("trainer:\n  max_epochs: 1\ndata:\n  train: 1\n")
    assert not trains_network([f"--config={other}"])  # a setting of that name elsewhere says nothing


def test_a_training_that_was_cut_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "line.yaml"
    path.write_text(CONFIG.replace("mode: min}", "mode: min, save_last: true}"))
    assert fit(str(path), tmp_path, "--trainer.max_epochs", "1") == 0
    folder = tmp_path / "runs" / "line"
    (folder / "network.safetensors").unlink()  # as if it had been killed behind its first epoch
    assert load_tree(folder / "checkpoints" / "last.ckpt")["global_step"] == 4  # no pickle
    assert fit(str(path), tmp_path, "--resume", "auto") == 0
    with safe_open(folder / "network.safetensors", "pt") as file:
        assert file.get_tensor("slope").item() == pytest.approx(2 - 2 * 0.2**12, abs=1e-6)
    assert load_tree(folder / "checkpoints" / "last.ckpt")["global_step"] == 12
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        fit(str(path), tmp_path, "--resume", "auto")
    assert stop.value.code == 0
    assert "has come to its end already" in capsys.readouterr().out
    for name, *other in (["model.init_args.start 0.0", "--model.start", "0.5"], ["seed_", "--seed_everything", "7"]):
        assert fit(str(path), tmp_path, "--resume", "auto", *other) == 2
        assert f"made with other settings ({name}" in capsys.readouterr().err
