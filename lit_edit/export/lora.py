"""The updates as a LoRA adapter that ``peft`` loads: a few edits are a matrix of low rank, so nothing need be lost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lit_edit.data.request import EditRequest
from lit_edit.errors import ArgumentError, counted
from lit_edit.export.delta import check_edited
from lit_edit.export.model import check_written, edits_table, escape, write_folder
from lit_edit.files.tensor_files import save_tensors
from lit_edit.ledger.edit_ledger import EditLedger, LedgerEntry
from lit_edit.metrics.evaluation import Summary, evaluate_edits, summarise
from lit_edit.models.language_model import LanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PREFIX = "base_model.model."  # what peft puts before the names of the model it wraps


@dataclass(frozen=True)
class LowRank:
    """The update of one layer as a product of two narrow matrices, in float32 as they are written.

    Attributes:
        up: ``(d_out, r)``, peft's ``lora_B``.
        down: ``(r, d_in)``, peft's ``lora_A``.
        needed: The rank from which on the product is the whole update, to float32 round-off.
        error: What the product lacks, as Frobenius norms: ``|delta - up down| / |delta|``.
    """

    up: Tensor
    down: Tensor
    needed: int
    error: float

    @property
    def exact(self) -> bool:
        """Whether nothing but float32 round-off was lost."""
        return self.up.shape[1] >= self.needed

    def product(self) -> Tensor:
        """Return the update that the adapter makes, ``(d_out, d_in)``, float64."""
        return self.up.double() @ self.down.double()


@torch.no_grad()
def factorise(deltas: Mapping[str, Tensor], rank: int | None = None) -> dict[str, LowRank]:
    r"""Write updates ``(d_out, d_in)`` as products of two matrices of one rank ``r``, ``rank`` at most.

    By default that is what the layer that needs most needs; a layer that needs less is filled up with zeros. The best
    approximation of a rank is the beginning of the singular value decomposition (Eckart and Young, 1936);
    :math:`\sqrt{\sigma}` goes to either side, so that neither matrix is large.

    Example:
        >>> delta = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0, 4.0]))
        >>> part = factorise({"w": delta})["w"]
        >>> part.needed, part.up.shape, part.error < 1e-6
        (1, torch.Size([2, 1]), True)
    """
    if rank is not None and rank < 1:
        raise ArgumentError(f"--rank must be at least 1, got {rank}")
    whole = {name: _decompose(delta) for name, delta in deltas.items()}
    needed = max(1, *(len(values) for _, values, _ in whole.values()))
    size = needed if rank is None else min(rank, needed)
    return {name: _cut(deltas[name], whole[name], size) for name in deltas}


def _decompose(delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return left vectors, singular values and right vectors, without those that float32 round-off hides."""
    left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
    tails = values.square().flip(0).cumsum(0).flip(0).sqrt()  # what is lost by stopping before each
    needed = int((tails > torch.finfo(torch.float32).eps * tails[0]).sum())
    return left[:, :needed].clone(), values[:needed], right[:needed].clone()  # the rest is large, and let go


def _cut(delta: Tensor, whole: tuple[Tensor, Tensor, Tensor], size: int) -> LowRank:
    left, values, right = whole
    kept = min(size, len(values))
    roots = values[:kept].sqrt()
    up, down = torch.zeros(delta.shape[0], size), torch.zeros(size, delta.shape[1])
    up[:, :kept], down[:kept] = left[:, :kept] * roots, right[:kept] * roots[:, None]
    missing = torch.linalg.norm(delta.double().cpu() - up.double() @ down.double())
    error = (missing / torch.linalg.norm(delta.double().cpu()).clamp(min=torch.finfo(torch.float64).tiny)).item()
    return LowRank(up, down, len(values), error)


def export_lora(ledger: EditLedger, folder: Path, base: LanguageModel, rank: int | None = None) -> dict[str, LowRank]:
    """Write the updates of a ledger as an adapter folder for ``peft``, completely or not at all.

    Args:
        ledger: What was edited.
        folder: Where to; must be empty or not exist.
        base: How the model was loaded, for the adapter's settings and its card.
        rank: The largest rank allowed; by default as large as it takes.

    Returns:
        What was written, by parameter name.

    Raises:
        ExportError: If the folder holds files or is one, or nothing was edited.
        ArgumentError: If ``rank`` is below 1.
    """
    check_written(ledger)
    check_edited(ledger)
    names = [name for name in ledger.names.values() if name in ledger.deltas]  # in the order of the layers
    parts = factorise({name: ledger.deltas[name] for name in names}, rank)

    def fill(ready: Path) -> None:
        tensors: dict[str, Tensor] = {}
        for name, part in parts.items():
            module = _PREFIX + name.removesuffix(".weight")
            tensors |= {f"{module}.lora_A.weight": part.down, f"{module}.lora_B.weight": part.up}
        save_tensors(tensors, ready / "adapter_model.safetensors", metadata={"format": "pt"})
        settings = json.dumps(adapter_config(ledger, parts, base), indent=2, ensure_ascii=False) + "\n"
        (ready / "adapter_config.json").write_text(settings, encoding="utf-8")
        (ready / "README.md").write_text(adapter_card(ledger.entries, base.name, parts), encoding="utf-8")

    write_folder(folder, fill)
    return parts


def adapter_config(ledger: EditLedger, parts: Mapping[str, LowRank], base: LanguageModel) -> dict[str, Any]:
    """Return the settings that ``peft`` reads; it fills in what is not named."""
    rank = next(iter(parts.values())).up.shape[1]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "revision": base.revision,
        "r": rank,
        "lora_alpha": rank,  # peft multiplies by lora_alpha / r
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": isinstance(ledger.adapter.down_proj(ledger.layers[0]), Conv1D),
        "target_modules": [name.removesuffix(".weight") for name in parts],  # whole names: those and no others
        "inference_mode": True,
    }


def adapter_card(entries: Sequence[LedgerEntry], base_name: str, parts: Mapping[str, LowRank]) -> str:
    """Return the adapter's card. What users wrote is escaped: it cannot become markup."""
    rank = next(iter(parts.values())).up.shape[1]
    layers = "\n".join(f"| `{name}` | {part.needed} | {part.error:.2g} |" for name, part in parts.items())
    exact = all(part.exact for part in parts.values())
    what = "holds them completely" if exact else "is an approximation: what it lacks stands below"
    return f"""---
library_name: peft
tags: [knowledge-editing, lit-edit, lora]
---

# {escape(base_name)}, edited: a LoRA adapter

{counted(len(entries), "fact")} changed by lit-edit in {escape(base_name)}, as an adapter of rank {rank}, which {what}.
The statements below are what the model is **made to say**; they need not be true.

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder")
```

The base model must be the one named above, unedited.

{edits_table(entries)}

## Changed weights

| parameter | rank of the whole update | relative error (Frobenius) |
|---|---|---|
{layers}
"""


@torch.no_grad()
def measure_truncation(
    ledger: EditLedger,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    parts: Mapping[str, LowRank],
) -> tuple[Summary, Summary]:
    """Measure what a truncated adapter costs: metrics of the edited model, and of the base model with the adapter.

    Agreement is with the base model.
    """
    if not requests:
        raise ValueError("metrics need at least one request")
    layers = {name: layer for layer, name in ledger.names.items()}
    weights = {name: ledger.edited_weight(layers[name], part.product()) for name, part in parts.items()}
    models = (ledger.original(), ledger.adapter, ledger.adapter.with_weights(weights))
    base, whole, cut = (evaluate_edits(model, tokenizer, requests) for model in models)
    before = {result.id: result for result in base}
    return summarise(whole, before), summarise(cut, before)
