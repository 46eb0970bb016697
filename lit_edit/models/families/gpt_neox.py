"""GPT-NeoX and Pythia. The head is called ``embed_out``."""

from lit_edit.models.spec import ArchSpec

SPEC = ArchSpec(
    family="gpt_neox",
    layers="gpt_neox.layers",
    down_proj="mlp.dense_4h_to_h",
    norm="gpt_neox.final_layer_norm",
    head="embed_out",
    model_types=("gpt_neox",),
)
