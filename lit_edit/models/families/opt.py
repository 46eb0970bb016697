"""OPT. There is no MLP module: ``fc2`` sits in the layer. The 350m model has no final norm but projects out."""

from lit_edit.models.spec import ArchSpec

SPEC = ArchSpec(
    family="opt",
    layers="model.decoder.layers",
    down_proj="fc2",
    norm="model.decoder.final_layer_norm",
    post_norm="model.decoder.project_out",
    model_types=("opt",),
)
