"""The architecture families that are known, one description each; nothing else in the package knows a module path."""

from __future__ import annotations

from dataclasses import replace

from lit_edit.models.spec import ArchSpec

# Llama 1 to 3 and models of the same build, SmolLM2 among them.
LLAMA = ArchSpec(
    family="llama",
    layers="model.layers",
    down_proj="mlp.down_proj",
    norm="model.norm",
    model_types=("llama",),
)
# Norms before and after each block; attention and final logits are soft-capped.
GEMMA2 = replace(
    LLAMA,
    family="gemma2",
    output_norm="post_feedforward_layernorm",
    logit_softcap="final_logit_softcapping",
    model_types=("gemma2",),
)
# DistilGPT-2 too. Its projections are ``Conv1D``: weights are stored ``(d_in, d_out)``.
GPT2 = ArchSpec(
    family="gpt2",
    layers="transformer.h",
    down_proj="mlp.c_proj",
    norm="transformer.ln_f",
    model_types=("gpt2",),
)

SPECS: tuple[ArchSpec, ...] = (
    GPT2,
    # Attention and MLP run in parallel on one norm; the head has a bias.
    replace(GPT2, family="gptj", down_proj="mlp.fc_out", model_types=("gptj",)),
    # Pythia too. Attention and MLP run in parallel, each on a norm of its own.
    ArchSpec(
        family="gpt_neox",
        layers="gpt_neox.layers",
        down_proj="mlp.dense_4h_to_h",
        norm="gpt_neox.final_layer_norm",
        model_types=("gpt_neox",),
    ),
    # There is no MLP module: ``fc2`` sits in the layer. The 350m model has no final norm but projects out.
    ArchSpec(
        family="opt",
        layers="model.decoder.layers",
        down_proj="fc2",
        norm="model.decoder.final_layer_norm",
        post_norm="model.decoder.project_out",
        model_types=("opt",),
    ),
    LLAMA,
    # With sliding-window attention in some versions.
    replace(LLAMA, family="mistral", model_types=("mistral",)),
    # Qwen2 and Qwen2.5, with biases in the attention projections.
    replace(LLAMA, family="qwen2", model_types=("qwen2",)),
    # Dense models, with norms on queries and keys.
    replace(LLAMA, family="qwen3", model_types=("qwen3",)),
    GEMMA2,
    # Text models. Sliding and full attention layers alternate, each kind with its own rotary base.
    replace(GEMMA2, family="gemma3", model_types=("gemma3_text",)),
    # Phi-3 and Phi-4-mini. Gate and up projection share one matrix.
    replace(LLAMA, family="phi3", model_types=("phi3",)),
)
