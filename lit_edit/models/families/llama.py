"""Llama 1 to 3 and models of the same build, SmolLM2 among them."""

from lit_edit.models.spec import ArchSpec

SPEC = ArchSpec(
    family="llama",
    layers="model.layers",
    down_proj="mlp.down_proj",
    norm="model.norm",
    model_types=("llama",),
)
