"""What ``trainer.precision`` means for a stream of edits: which settings fit, and what each needs.

Passes of the model are made as the setting says; statistics, solves and updates are float64 (or as the solver's storage
says) under all of them, and a weight is always ``cast(W0 + D)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, MixedPrecision, TransformerEnginePrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lit_edit.models.adapter import ModelAdapter

_USE = "use 32-true, bf16-true, bf16-mixed or 16-true"


def check_precision(trainer: Trainer) -> None:
    """Refuse settings under which edits would go wrong.

    Raises:
        MisconfigurationException: If the setting is one of those; says why and what to use.
    """
    plugin, precision = trainer.precision_plugin, str(trainer.precision)
    if isinstance(plugin, TransformerEnginePrecision) or precision.startswith("transformer-engine"):
        raise MisconfigurationException(
            "trainer.precision=transformer-engine puts layers of its own, which multiply in 8 bits, in the place of "
            f"the model's linear layers; edits are written into torch.nn.Linear or Conv1D: {_USE}"
        )
    if isinstance(plugin, BitsandbytesPrecision):
        raise MisconfigurationException(
            "trainer.plugins=BitsandbytesPrecision quantises the weights, and the small change that an edit makes to "
            f"each of them would be rounded away: {_USE}"
        )
    if precision == "16-mixed":
        raise MisconfigurationException(
            f"trainer.precision=16-mixed scales the gradients of an optimizer, and there is none: {_USE}"
        )


@torch.no_grad()
def check_range(adapter: ModelAdapter) -> None:
    """Refuse a float16 model whose states float16 cannot hold; other types have the range.

    States of language models are large at a few places, mostly at the first token: 25,500 in SmolLM2-135M.

    Raises:
        MisconfigurationException: If a pass over a few tokens is not finite; says what to use.
    """
    if adapter.dtype != torch.float16:
        return
    words = int(adapter.model.config.get_text_config().vocab_size)
    ids = torch.arange(min(words, 32), device=adapter.device)[None]
    if not torch.isfinite(adapter.last_hidden(ids, torch.ones_like(ids))).all():
        raise MisconfigurationException(
            "states of this model leave the range of float16 (65504), the type that its weights have by "
            "trainer.precision=16-true or model.language_model.dtype: use trainer.precision=bf16-true or 32-true"
        )


def passes_of(trainer: Trainer | None) -> AbstractContextManager[None]:
    """Return the context in which a Trainer makes passes of the model: autocast with ``bf16-mixed``, none otherwise.

    Lightning opens it for steps only. What is measured before and after them is to be comparable with what is measured
    in them.
    """
    plugin = None if trainer is None else trainer.precision_plugin
    return plugin.forward_context() if isinstance(plugin, MixedPrecision) else nullcontext()


def tables_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's floating buffers that are not saved with it, such as the frequencies of rotary positions.

    transformers keeps them in float32 whatever type the weights have; ``trainer.precision=bf16-true`` casts them along
    with the weights. Frequencies are then up to 0.4 % off, and the model says something else than when it is loaded.
    """
    tables = {}
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name in module._non_persistent_buffers_set:
                tables[f"{prefix}.{name}" if prefix else name] = buffer.detach().clone()
    return tables


def restore_tables(model: nn.Module, tables: Mapping[str, Tensor]) -> None:
    """Put :func:`tables_of` back in their type, on whatever device the model has been moved to since."""
    for path, table in tables.items():
        prefix, _, name = path.rpartition(".")
        module = model.get_submodule(prefix)
        now: Tensor = getattr(module, name)
        if now.dtype != table.dtype:
            setattr(module, name, table.to(now.device))


def cast_as(model: nn.Module, precision: object) -> None:
    """Cast a model as a Trainer does, for those who open its runs without one.

    Args:
        model: As it was loaded.
        precision: ``trainer.precision`` of the run; mixed precision leaves the weights alone.
    """
    kinds = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64, "64": torch.float64}
    if (dtype := kinds.get(str(precision))) is not None:
        tables = tables_of(model)
        model.to(dtype)
        restore_tables(model, tables)
