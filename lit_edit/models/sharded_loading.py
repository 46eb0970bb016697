"""Loading a model in parts: each process reads from the files what it holds, and nobody ever holds all of it."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig

from lit_edit.models.packaged import ModelUnavailableError
from lit_edit.models.spec import ArchSpec
from lit_edit.models.structure import find_spec

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel


def cut_layers(model: PreTrainedModel, mesh: DeviceMesh, arch: ArchSpec | None = None) -> None:
    """Cut every decoder layer over the devices of a mesh (FSDP2); embeddings, norm and head stay whole.

    The head and the embeddings are read in parts of passes, outside the model's own forward, where nothing would gather
    them.
    """
    for layer in _layers(model, arch):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)


def load_in_parts(
    folder: Path,
    mesh: DeviceMesh,
    device: torch.device,
    dtype: torch.dtype | None = None,
    arch: ArchSpec | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Load a folder of safetensors files with decoder layers cut over a mesh; options are for transformers."""
    from accelerate import init_empty_weights

    files = _Files(folder)
    config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=options.get("trust_remote_code"))
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    cut_layers(model, mesh, arch)
    for module in model.modules():  # an empty home for each part, and nothing for what is still to come
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(parameter, DTensor):
                module.register_parameter(name, nn.Parameter(torch.empty_like(parameter, device=device), False))
    for layer in _layers(model, arch):
        kept = [buffer.clone() for buffer in layer.buffers()]  # they hold what they should
        layer.to_empty(device=device)
        for buffer, value in zip(layer.buffers(), kept, strict=True):
            buffer.copy_(value)
    model.tie_weights()
    with suppress(OSError):  # as from_pretrained does: texts are drawn as the model's folder says
        model.generation_config = GenerationConfig.from_pretrained(folder)
    for name, parameter in model.named_parameters():  # tied ones once
        _fill(parameter, files, name, model.base_model_prefix)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    return model.eval().requires_grad_(False)


def _layers(model: PreTrainedModel, arch: ArchSpec | None) -> list[nn.Module]:
    return list(model.get_submodule((arch or find_spec(model)).layers).children())


class _Files:
    """The safetensors files of a model folder."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            where: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        elif (folder / "model.safetensors").is_file():
            with safe_open(folder / "model.safetensors", "pt") as file:
                where = dict.fromkeys(file.keys(), "model.safetensors")
        else:
            raise ModelUnavailableError(
                f"{folder} holds no safetensors files, and only these can be read in parts: load the model once on one "
                "device and save it with model.save_pretrained, or use trainer.strategy=ddp"
            )
        self.folder, self._where = folder, where
        self._open: dict[str, Any] = {}

    def find(self, name: str, prefix: str) -> Any:
        """Return the slice of a parameter, which older files name without the model's prefix, or with it."""
        older = name.replace("lm_head.", "embed_out.")  # GPT-NeoX
        for known in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}", older):
            if known in self._where:
                file = self._where[known]
                if file not in self._open:
                    self._open[file] = safe_open(self.folder / file, "pt").__enter__()
                return self._open[file].get_slice(known)
        raise ModelUnavailableError(f"{self.folder} holds no weight {name!r}: the files are those of another model")


def _fill(parameter: Tensor, files: _Files, name: str, prefix: str) -> None:
    """Read a parameter, or this process's part of it."""
    found = files.find(name, prefix)
    if tuple(found.get_shape()) != tuple(parameter.shape):
        raise ModelUnavailableError(
            f"{files.folder}: {name} has shape {tuple(found.get_shape())}, the config asks for {tuple(parameter.shape)}"
        )
    if not isinstance(parameter, DTensor):
        parameter.data.copy_(found[:])
        return
    local, (placement,) = parameter.to_local(), parameter.placements
    if not isinstance(placement, Shard) or placement.dim != 0:
        raise ModelUnavailableError(f"{name} is cut along another dimension than its first, which cannot be read")
    size = -(-parameter.shape[0] // parameter.device_mesh.size())
    start = parameter.device_mesh.get_local_rank() * size
    if len(local):
        local.detach().copy_(found[start : start + len(local)])
