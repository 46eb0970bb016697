"""Phi-3 and Phi-4-mini. Gate and up projection share one matrix."""

from lit_edit.models.spec import ArchSpec

SPEC = ArchSpec(
    family="phi3",
    layers="model.layers",
    down_proj="mlp.down_proj",
    norm="model.norm",
    model_types=("phi3",),
)
