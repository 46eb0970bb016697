"""Taking the edited model away: a Hugging Face folder with a card that says what was edited, and a run's own deltas."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_edit.errors import UserError, counted
from lit_edit.files.paths import expand, write_atomically
from lit_edit.files.tensor_files import check_digests, save_tensors, system_errors, with_digests
from lit_edit.ledger.edit_ledger import EditLedger, LayerUpdate, LedgerEntry, weights_state
from lit_edit.ledger.ownership import MARK

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ExportError(UserError):
    """The export cannot be made; the message says why."""


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ledger: EditLedger,
    folder: Path,
    base_name: str,
    state: dict[str, Tensor] | None = None,
) -> Path:
    """Write model, tokenizer and card into ``folder``, completely or not at all.

    Args:
        model: The edited model.
        tokenizer: Its tokenizer.
        ledger: What was edited.
        folder: Where to; must be empty or not exist.
        base_name: Name of the model that was edited, for the card.
        state: The model's weights, where it does not hold them whole itself.

    Raises:
        ExportError: If the folder holds files, or is one.
    """
    check_written(ledger)

    def fill(ready: Path) -> None:
        with system_errors(ready):
            model.save_pretrained(ready, state_dict=state)
        _mark(ready / "config.json", len(ledger), base_name)
        tokenizer.save_pretrained(ready)
        (ready / "README.md").write_text(model_card(ledger.entries, base_name, ledger.layer_norms()), encoding="utf-8")

    return write_folder(folder, fill)


def _mark(config: Path, edits: int, base: str) -> None:
    """Note in an exported model that it is edited: whoever edits it again takes other weights for the original ones."""
    text = json.loads(config.read_text(encoding="utf-8"))
    marked = {**text, MARK: {"edits": edits, "base": base, "version": version("lit-edit")}}
    config.write_text(json.dumps(marked, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_written(ledger: EditLedger) -> None:
    """Raise :class:`ExportError` if the edits are kept beside the weights: there is no edited model to take away."""
    if ledger.adapter.memory is not None:
        raise ExportError(
            "these edits are kept beside the weights, in the memory of the run: there is no edited model, delta or "
            "adapter to export. Ask the run with lit-edit ask; in Python see 'Editors that keep their edits beside the "
            "weights' in docs/editors.md"
        )


def write_folder(folder: Path, fill: Callable[[Path], object]) -> Path:
    """Let ``fill`` write files, ``README.md`` among them, beside a new or empty folder, then put them there at once.

    On any exception nothing stays; :class:`ExportError` says that ``folder`` holds files, or is one.
    """
    folder = expand(folder)
    check_export_folder(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        ready = Path(scratch) / "ready"
        ready.mkdir()  # with the user's permissions; the scratch folder is closed to others
        fill(ready)
        for file in ready.glob("*.safetensors"):  # which its library writes for the owner alone
            shutil.copymode(ready / "README.md", file)
        if folder.exists():
            folder.rmdir()
        shutil.move(ready, folder)
    return folder


def check_export_folder(folder: Path) -> None:
    """Raise :class:`ExportError` unless ``folder`` does not exist or is an empty folder."""
    if folder.is_file():
        raise ExportError(f"{folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ExportError(f"{folder} is not empty; name a new folder")
    _check_parent(folder)


def check_export_file(path: Path) -> None:
    """Raise :class:`ExportError` unless ``path`` can be made: nothing of that name is there."""
    if path.is_dir():
        raise ExportError(f"{path} is a folder; name a new file")
    if path.exists() or path.is_symlink():
        raise ExportError(f"{path} exists and is not overwritten; name a new file")
    _check_parent(path)


def _check_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"{path} cannot be made: {error.strerror or error}") from error
    if not os.access(path.parent, os.W_OK):
        raise ExportError(f"{path} cannot be made: {path.parent} is not writable")


def model_card(entries: Sequence[LedgerEntry], base_name: str, norms: dict[str, dict[str, float]]) -> str:
    """Return the model card. What users wrote is escaped: it cannot become markup.

    Example:
        >>> card = model_card([LedgerEntry("1", "Italy", "The capital of Italy is", "<b>Vienna</b>")], "some/model", {})
        >>> "<b>" in card, "&lt;b&gt;Vienna" in card
        (False, True)
    """
    layers = "\n".join(f"| `{name}` | {v['relative_change']:.4f} |" for name, v in norms.items())
    return f"""---
library_name: transformers
tags: [knowledge-editing, lit-edit]
---

# {escape(base_name)}, edited

This is {escape(base_name)} with {counted(len(entries), "fact")} changed by lit-edit: updates of
MLP down projections. The statements below are what
the model was **made to say**; they need not be true.

{edits_table(entries)}

## Changed weights

| parameter | relative change (Frobenius) |
|---|---|
{layers}
"""


def edits_table(entries: Sequence[LedgerEntry]) -> str:
    """Return the edits as a Markdown table, escaped."""
    rows = (
        f"| {i} | {escape(e.subject)} | {escape(e.prompt)} | {escape(e.target_new)} |" for i, e in enumerate(entries, 1)
    )
    return "\n".join(("| # | subject | prompt | new object |", "|---|---|---|---|", *rows))


def escape(text: str) -> str:
    """Make any text safe inside a Markdown table cell."""
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", text)


def save_deltas(ledger: EditLedger, path: Path, base_hash: str) -> None:
    """Write the updates of a ledger as safetensors, float64, with the hash of the weights they belong to."""
    tensors = {name: delta.contiguous().cpu() for name, delta in ledger.deltas.items()}
    meta = {
        "format": "lit-edit-deltas",
        "version": "1",
        "base_hash": base_hash,
        "edits": str(len(ledger)),
        "state": weights_state(ledger.journal),
    }
    write_atomically(path, lambda target: save_tensors(tensors, target, with_digests(meta, tensors)))


def read_tensors(path: Path) -> tuple[Mapping[str, str], dict[str, Tensor]]:
    """Return metadata and tensors of a safetensors file; :class:`ExportError` if there is none or it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            meta, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        check_digests(meta, tensors)
        return meta, tensors
    except (SafetensorError, OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read: {error}") from error


@torch.no_grad()
def apply_deltas(ledger: EditLedger, path: Path, base_hash: str) -> None:
    """Write saved updates into an unedited model; :class:`ExportError` if damaged, or those of other weights."""
    meta, deltas = read_tensors(path)
    if meta.get("base_hash") != base_hash:
        raise ExportError(f"{path} belongs to other base weights (hash {meta.get('base_hash')} against {base_hash})")
    by_name = {name: layer for layer, name in ledger.names.items()}
    if unknown := sorted(set(deltas) - set(by_name)):
        raise ExportError(f"{path} edits {', '.join(unknown)}, which are not among the weights to be edited")
    ledger.commit([LayerUpdate(by_name[name], name, delta) for name, delta in deltas.items()], [])
