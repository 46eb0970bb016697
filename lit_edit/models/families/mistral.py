"""Mistral. As Llama, with sliding-window attention in some versions."""

from lit_edit.models.spec import ArchSpec

SPEC = ArchSpec(
    family="mistral",
    layers="model.layers",
    down_proj="mlp.down_proj",
    norm="model.norm",
    model_types=("mistral",),
)
