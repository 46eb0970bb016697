"""Where each known family of models keeps its parts; nothing else in the package knows a module path."""

from __future__ import annotations

from lit_edit.models.spec import ArchSpec

_LLAMA = ("model.layers", "mlp.down_proj", "model.norm")

SPECS: tuple[ArchSpec, ...] = (
    # GPT-2, also DistilGPT-2. Its projections are ``Conv1D``: weights are stored ``(d_in, d_out)``.
    ArchSpec("gpt2", "transformer.h", "mlp.c_proj", "transformer.ln_f", model_types=("gpt2",)),
    # GPT-J. Attention and MLP run in parallel on one norm; the head has a bias.
    ArchSpec("gptj", "transformer.h", "mlp.fc_out", "transformer.ln_f", model_types=("gptj",)),
    # GPT-NeoX and Pythia. Attention and MLP run in parallel, each on a norm of its own.
    ArchSpec(
        "gpt_neox", "gpt_neox.layers", "mlp.dense_4h_to_h", "gpt_neox.final_layer_norm", model_types=("gpt_neox",)
    ),
    # OPT. There is no MLP module: ``fc2`` sits in the layer. The 350m model has no final norm but projects out.
    ArchSpec(
        "opt",
        "model.decoder.layers",
        "fc2",
        "model.decoder.final_layer_norm",
        post_norm="model.decoder.project_out",
        model_types=("opt",),
    ),
    # Llama 1 to 3 and models of the same build, SmolLM2 among them.
    ArchSpec("llama", *_LLAMA, model_types=("llama",)),
    # Mistral. As Llama, with sliding-window attention in some versions.
    ArchSpec("mistral", *_LLAMA, model_types=("mistral",)),
    # Qwen2 and Qwen2.5. As Llama, with biases in the attention projections.
    ArchSpec("qwen2", *_LLAMA, model_types=("qwen2",)),
    # Qwen3 (dense). As Llama, with norms on queries and keys.
    ArchSpec("qwen3", *_LLAMA, model_types=("qwen3",)),
    # Gemma 2. Norms before and after each block; attention and final logits are soft-capped.
    ArchSpec(
        "gemma2",
        *_LLAMA,
        output_norm="post_feedforward_layernorm",
        logit_softcap="final_logit_softcapping",
        model_types=("gemma2",),
    ),
    # Gemma 3, text models. Sliding and full attention layers alternate, each kind with its own rotary base.
    ArchSpec(
        "gemma3",
        *_LLAMA,
        output_norm="post_feedforward_layernorm",
        logit_softcap="final_logit_softcapping",
        model_types=("gemma3_text",),
    ),
    # Phi-3 and Phi-4-mini. Gate and up projection share one matrix.
    ArchSpec("phi3", *_LLAMA, model_types=("phi3",)),
)
