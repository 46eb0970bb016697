"""Opening a finished run: its settings, its edits, its model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from lit_edit.errors import UserError
from lit_edit.export import apply_deltas
from lit_edit.ledger import EditLedger, LedgerEntry
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.language_model import LanguageModel
from lit_edit.models.spec import ArchSpec
from lit_edit.stats.second_moment import weights_hash


class RunError(UserError):
    """A run folder that cannot be opened; the message says why."""


@dataclass
class OpenRun:
    """A run's model, unedited until :meth:`apply` is called, and what was edited."""

    folder: Path
    language_model: LanguageModel
    ledger: EditLedger
    tokenizer: Any
    entries: list[LedgerEntry]
    base_hash: str

    def apply(self) -> None:
        """Write the run's updates into the model."""
        apply_deltas(self.ledger, self.folder / "ledger" / "deltas.safetensors", self.base_hash)
        self.ledger.entries[:] = self.entries


def open_run(folder: Path) -> OpenRun:
    """Load the base model of a run and read what the run edited.

    Raises:
        RunError: If the folder is no finished run.
    """
    folder = folder.expanduser()
    deltas, config = folder / "ledger" / "deltas.safetensors", folder / "config.yaml"
    if not folder.is_dir():
        raise RunError(f"there is no run folder {folder}")
    if not deltas.is_file() or not config.is_file():
        raise RunError(
            f"{folder} is no finished run (no {deltas.name if config.is_file() else config.name}); if the run was "
            f"interrupted, finish it: lit-edit fit --config {config} --ckpt_path {folder}/checkpoints/last.ckpt"
        )
    try:
        settings = dict(yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["language_model"])
        if settings.get("arch"):
            arch = dict(settings["arch"])
            settings["arch"] = ArchSpec(**{**arch, "model_types": tuple(arch.get("model_types", ()))})
        language_model = LanguageModel(**settings)
        with safe_open(deltas, "pt") as file:
            names = set(file.keys())
        rows = (folder / "ledger" / "edits.jsonl").read_text("utf-8").split("\n")  # texts may hold other line breaks
        entries = [_entry(json.loads(row)) for row in rows if row]
    except (yaml.YAMLError, KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
        raise RunError(f"{folder} cannot be opened: {error}") from error
    model, tokenizer = language_model.load()
    adapter = ModelAdapter(model, language_model.arch, products=language_model.products)
    layers = [layer for layer in range(adapter.n_layers) if adapter.weight_name(layer) in names]
    if len(layers) != len(names):
        raise RunError(f"{deltas} edits parameters that {language_model.name} does not have: {sorted(names)}")
    return OpenRun(folder, language_model, EditLedger(adapter, layers), tokenizer, entries, weights_hash(model))


def _entry(row: dict[str, Any]) -> LedgerEntry:
    return LedgerEntry(row["id"], row["subject"], row["prompt"], row["target_new"])
