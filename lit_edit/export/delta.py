"""The updates alone, as one file that names the base weights it belongs to: small to share, exact to apply."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from torch import Tensor

from lit_edit.export.model import ExportError, check_export_file, check_written, read_tensors
from lit_edit.files.paths import expand, write_atomically
from lit_edit.files.tensor_files import save_tensors, with_digests
from lit_edit.ledger.edit_ledger import EditLedger, EditRefusedError, LayerUpdate, LedgerEntry
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.language_model import DType, LanguageModel
from lit_edit.models.spec import ArchSpec
from lit_edit.stats.second_moment import weights_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FORMAT, _VERSION = "lit-edit-export", "1"
_LAYOUT = "(d_out, d_in), added to W of y = W x; transformers' Conv1D (GPT-2) stores the transpose of W"
_TEXTS = ("id", "prompt", "subject", "target_new")


@dataclass(frozen=True)
class DeltaFile:
    """An exported file of deltas ``(d_out, d_in)``, float64, in order by itself but not yet compared with a model.

    ``base`` says how the edited model was loaded, ``base_hash`` is of its weights in the type that ``base`` names.
    """

    path: Path
    base_hash: str
    base: LanguageModel
    entries: tuple[LedgerEntry, ...]
    deltas: Mapping[str, Tensor]

    def base_at(self, name: str) -> LanguageModel:
        """Return how to load the base model from ``name``; the revision counts where it was made for that name."""
        return replace(self.base, name=name, revision=self.base.revision if name == self.base.name else None)


def export_delta(ledger: EditLedger, path: Path, base_hash: str, base: LanguageModel) -> Path:
    """Write the updates of a ledger as one safetensors file that :func:`apply_delta` reads.

    In float64, so that the edited weights come back bit for bit; from float32, one weight in seven of a real run came
    back with another last bit.

    Args:
        ledger: What was edited.
        path: A new file.
        base_hash: Hash of the unedited weights.
        base: How the model was loaded.

    Returns:
        The file.

    Raises:
        ExportError: If the file exists or cannot be made, or nothing was edited.
    """
    check_written(ledger)
    path = expand(path)
    check_export_file(path)
    check_edited(ledger)
    arch = None if base.arch is None else asdict(base.arch)
    if arch is not None:
        del arch["model_types"]  # of no use with a given model
    meta = {
        "format": _FORMAT,
        "version": _VERSION,
        "lit_edit_version": version("lit-edit"),
        "layout": _LAYOUT,
        "base_hash": base_hash,
        "base_model": base.name,
        "base_revision": base.revision or "",
        "base_dtype": str(ledger.adapter.dtype).removeprefix("torch.") if base.dtype == "auto" else base.dtype,
        "base_arch": json.dumps(arch),
        "edits": json.dumps([{key: getattr(e, key) for key in _TEXTS} for e in ledger.entries], ensure_ascii=False),
    }
    tensors = {name: delta.to("cpu", torch.float64).contiguous() for name, delta in ledger.deltas.items()}
    write_atomically(path, lambda target: save_tensors(tensors, target, with_digests(meta, tensors)))
    return path


def check_edited(ledger: EditLedger) -> None:
    """Raise :class:`ExportError` if no edit holds; what edits leave that were taken out again is rounding."""
    if not ledger.deltas or not len(ledger):
        raise ExportError("no edit holds: there is no update to export (--as model takes the model as it is)")


def read_delta(path: Path) -> DeltaFile:
    """Read a file that :func:`export_delta` wrote; :class:`ExportError` if it is damaged, or is something else."""
    meta, deltas = read_tensors(path)
    if meta.get("format") == "lit-edit-deltas":
        raise ExportError(
            f"{path} belongs to a run folder and does not say which model it was made on; make a file to take away: "
            "lit-edit export --run RUN --as delta"
        )
    if (meta.get("format"), meta.get("version")) != (_FORMAT, _VERSION):
        raise ExportError(
            f"{path} is not a file of deltas that this version of lit-edit reads: its metadata must say format "
            f"{_FORMAT!r}, version {_VERSION!r}, and say {meta.get('format')!r}, {meta.get('version')!r}; "
            "lit-edit export --run RUN --as delta writes one"
        )
    try:
        base_hash, dtype = meta["base_hash"], meta["base_dtype"]
        if dtype not in get_args(DType) or dtype == "auto":
            raise ValueError(f"base_dtype {dtype!r} is no type of weights")
        arch = json.loads(meta["base_arch"])
        edits = [{key: fields[key] for key in _TEXTS} for fields in json.loads(meta["edits"])]
        _check_texts(value for value in (arch or {}).values() if value is not None)
        _check_texts(text for edit in edits for text in edit.values())
        arch = None if arch is None else ArchSpec(**arch)
        base = LanguageModel(meta["base_model"], meta["base_revision"] or None, cast("DType", dtype), arch=arch)
        entries = tuple(LedgerEntry(**edit) for edit in edits)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ExportError(f"{path} has damaged metadata: {error!r}; export it anew") from error
    if not deltas:
        raise ExportError(f"{path} holds no deltas; export it anew")
    return DeltaFile(path, base_hash, base, entries, {name: _checked(path, name, d) for name, d in deltas.items()})


def apply_delta(model: PreTrainedModel, path: str | Path) -> PreTrainedModel:
    """Write exported updates into the model they were made on, in place, and return it.

    Args:
        model: The base model, unedited, in the type that it had when the edits were made.
        path: A file that ``lit-edit export --as delta`` wrote.

    Raises:
        ExportError: If the file is damaged, or belongs to other weights; the model is as it was then.
    """
    edit_with(model, read_delta(expand(path)))
    return model


def edit_with(model: PreTrainedModel, file: DeltaFile) -> EditLedger:
    """Write the updates of a file into its base model and return the ledger, which can take them back.

    An :class:`ExportError` for other weights, or where they do not fit, leaves the model as it was.
    """
    found = weights_hash(model)
    if found != file.base_hash:
        own = str(model.dtype).removeprefix("torch.")
        raise ExportError(
            f"{file.path} belongs to other base weights: it was made on {file.base.name!r} in {file.base.dtype}, hash "
            f"{file.base_hash}; this model is in {own}, hash {found}. Load exactly the weights it was made on, "
            "unedited and in that type"
        )
    adapter = ModelAdapter(model, file.base.arch)
    layers = [layer for layer in adapter.editable if adapter.weight_name(layer) in file.deltas]
    ledger = EditLedger(adapter, layers, adopt=True)  # these are the right weights, by their hash
    if unknown := sorted(set(file.deltas) - set(ledger.names.values())):
        raise ExportError(
            f"{file.path} edits {', '.join(map(repr, unknown[:5]))}, which this model does not have among the weights "
            f"that can be edited ({adapter.weight_name(adapter.editable[0])!r} and so on); export it anew"
        )
    updates = [LayerUpdate(layer, name, file.deltas[name]) for layer, name in ledger.names.items()]
    try:
        ledger.commit(updates, file.entries)
    except EditRefusedError as error:
        raise ExportError(f"{file.path} does not fit the model, which is left as it was: {error}") from error
    return ledger


def _checked(path: Path, name: str, delta: Tensor) -> Tensor:
    if delta.dim() != 2 or delta.dtype != torch.float64:
        raise ExportError(
            f"{path}: {name!r} must be a matrix in float64, got {delta.dtype} of shape {tuple(delta.shape)}; "
            "export it anew"
        )
    if not torch.isfinite(delta).all():
        raise ExportError(f"{path}: {name!r} holds NaN or infinite values; export it anew")
    return delta


def _check_texts(values: Iterable[Any]) -> None:
    for value in values:
        if not isinstance(value, str):
            raise TypeError(f"text expected, got {value!r}")
        value.encode()  # half a character cannot be written into the card
