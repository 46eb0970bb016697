"""Gemma 2. Norms before and after each block; attention and final logits are soft-capped."""

from lit_edit.models.spec import ArchSpec

SPEC = ArchSpec(
    family="gemma2",
    layers="model.layers",
    down_proj="mlp.down_proj",
    norm="model.norm",
    output_norm="post_feedforward_layernorm",
    logit_softcap="final_logit_softcapping",
    model_types=("gemma2",),
)
