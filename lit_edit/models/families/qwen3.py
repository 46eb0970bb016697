"""Qwen3 (dense). As Llama, with norms on queries and keys."""

from lit_edit.models.spec import ArchSpec

SPEC = ArchSpec(
    family="qwen3",
    layers="model.layers",
    down_proj="mlp.down_proj",
    norm="model.norm",
    model_types=("qwen3",),
)
