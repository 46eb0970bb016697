"""GPT-NeoX and Pythia. Attention and MLP run in parallel, each on a norm of its own."""

from lit_edit.models.spec import ArchSpec

SPEC = ArchSpec(
    family="gpt_neox",
    layers="gpt_neox.layers",
    down_proj="mlp.dense_4h_to_h",
    norm="gpt_neox.final_layer_norm",
    model_types=("gpt_neox",),
)
