"""Qwen2 and Qwen2.5. As Llama, with biases in the attention projections."""

from lit_edit.models.spec import ArchSpec

SPEC = ArchSpec(
    family="qwen2",
    layers="model.layers",
    down_proj="mlp.down_proj",
    norm="model.norm",
    model_types=("qwen2",),
)
