"""Small streams that several test files run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lit_edit import D4S, EditDataModule, EditStream, KeyStatistics, LanguageModel, TargetSettings
from lit_edit.loggers.run_csv import RunCSVLogger
from lit_edit.testing import tiny_model, tiny_requests, tiny_tokenizer

SETTINGS: dict[str, Any] = {"layers": [1, 2], "covariance_weight": 5.0, "target": TargetSettings(steps=6)}


class FixedStatistics(KeyStatistics):
    """Second moments without text: the identity."""

    def compute(self, adapter: Any, tokenizer: Any, layers: Any, progress: Any = None) -> dict[int, Tensor]:
        return {layer: torch.eye(adapter.shape(layer)[1], dtype=torch.float64) for layer in layers}


def make_stream(model_type: str = "llama", kind: type[EditStream] = EditStream, **settings: Any) -> EditStream:
    language_model = LanguageModel.of(tiny_model(model_type), tiny_tokenizer())
    return kind(language_model, D4S(**{**SETTINGS, **settings}), FixedStatistics())


def make_data(count: int = 6, **options: Any) -> EditDataModule:
    data = EditDataModule.from_requests(tiny_requests()[:count], **{"target_window": 4, **options})
    data.perplexity_texts = ["A plain sentence of some words.", "Another one follows it here."]
    return data


def make_trainer(folder: Path, callbacks: list[Any] | None = None, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": RunCSVLogger(str(folder)),
        "callbacks": callbacks or [],
        "default_root_dir": str(folder),
        "enable_checkpointing": any(type(c).__name__ == "ModelCheckpoint" for c in callbacks or []),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**{**defaults, **options})


def state_of(stream: EditStream) -> dict[str, Tensor]:
    """All tensors that a resumed run must reproduce bit for bit."""
    weights = {name: value.clone() for name, value in stream.model.state_dict().items()}
    solvers = {
        f"solver.{layer}.{name}": value
        for layer, solver in stream.editor.solvers.items()
        for name, value in solver.state_dict().items()
        if isinstance(value, Tensor)
    }
    return weights | solvers
