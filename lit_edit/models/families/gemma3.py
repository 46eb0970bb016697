"""Gemma 3, text models. Sliding and full attention layers alternate, each kind with its own rotary base."""

from lit_edit.models.spec import ArchSpec

SPEC = ArchSpec(
    family="gemma3",
    layers="model.layers",
    down_proj="mlp.down_proj",
    norm="model.norm",
    output_norm="post_feedforward_layernorm",
    logit_softcap="final_logit_softcapping",
    model_types=("gemma3_text",),
)
