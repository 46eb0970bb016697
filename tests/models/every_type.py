"""Every decoder that transformers can build, small: its own configuration class, four layers, a width of 32."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS = 4
TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# By the names that configurations have for them.
_SIZES: tuple[tuple[int, str], ...] = (
    (400, "vocab_size"),
    (32, "hidden_size d_model n_embd dim_model dim embed_dim embedding_size word_embed_proj_dim lru_width"),
    (
        48,
        "intermediate_size d_ff ffn_hidden_size dim_ff ffn_dim n_inner dff inner_hidden_size ffn_intermediate_size "
        "block_ff_dim shared_intermediate_size",
    ),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers"),
    (
        4,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads rotary_dim num_experts num_local_experts "
        "n_routed_experts moe_num_experts linear_num_value_heads mamba_n_heads n_mamba_heads mamba_num_heads",
    ),
    (2, "num_key_value_heads kv_heads num_experts_per_tok moe_k moe_topk linear_num_key_heads mamba_expand"),
    (
        8,
        "head_dim dim_head attention_head_dim kv_channels qk_rope_head_dim qk_nope_head_dim v_head_dim ssm_state_size "
        "linear_key_head_dim linear_value_head_dim mamba_d_state index_head_dim",
    ),
    (
        16,
        "moe_intermediate_size q_lora_rank kv_lora_rank qk_head_dim mamba_d_head mamba_head_dim mamba_chunk_size "
        "chunk_size expert_ffn_hidden_size",
    ),
    (24, "shared_expert_intermediate_size moe_shared_expert_intermediate_size"),
    (128, "max_position_embeddings n_positions n_ctx max_sequence_length max_seq_len"),
    (6, "sliding_window attention_window_size window_size"),
    (
        1,
        "n_group topk_group n_shared_experts moe_num_shared_experts num_shared_experts num_expert_group "
        "first_k_dense_replace mamba_n_groups n_groups bos_token_id",
    ),
    (0, "pad_token_id"),
)
SIZES: Mapping[str, int] = {name: size for size, names in _SIZES for name in names.split()} | {"eos_token_id": 2}
WANTED = ("head_dim", "num_key_value_heads")  # also where a configuration says that they follow from others

OWN: Mapping[str, Mapping[str, Any]] = {
    "falcon": {"head_dim": None},
    "granite": {"residual_multiplier": 0.22, "logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["attention", "mamba", "attention", "mamba"]},
}
"""Settings that a type wants besides."""


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Return a small configuration of a type."""
    kind = CONFIG_MAPPING[model_type]
    plain = kind()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        known = {name: _value(plain, name) for name in (*SIZES, "layer_types")}
    settings: dict[str, Any] = {
        name: size
        for name, size in SIZES.items()
        if _settable(kind, name) and (isinstance(known[name], int) or (name in WANTED and hasattr(plain, name)))
    }
    for name, alias in getattr(kind, "attribute_map", {}).items():
        if alias in settings:
            settings.pop(name, None)
    if (
        isinstance(known["layer_types"], (list, tuple))
        and "layers_block_type" not in vars(kind)
        and _settable(kind, "layer_types")
    ):
        kinds = list(dict.fromkeys(known["layer_types"]))
        settings["layer_types"] = [kinds[index % len(kinds)] for index in range(LAYERS)]
    if "kv_lora_rank" in settings:  # latent attention has as many heads of keys as of queries
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    settings |= OWN.get(model_type, {})
    return kind(**{name: value for name, value in settings.items() if value is not None})


def _value(config: PreTrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except AttributeError:  # it differs from layer to layer
        return None


def _settable(kind: type, name: str) -> bool:
    found = getattr(kind, name, None)
    return not (isinstance(found, property) and found.fset is None)


def tiny(model_type: str, seed: int = 0) -> PreTrainedModel:
    """Return a random model of a type, in evaluation mode and frozen; the global random state is left alone."""
    config = tiny_config(model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    return model.float().eval().requires_grad_(False)


LEFT_OUT: Mapping[str, str] = {
    "encoders, and decoders of sequence-to-sequence, speech and image models": (
        "bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert "
        "data2vec-text electra ernie git marian mbart megatron-bert musicgen musicgen_melody mvp pegasus plbart "
        "prophetnet reformer rembert roberta roberta-prelayernorm roc_bert roformer trocr whisper xlm "
        "xlm-roberta xlm-roberta-xl xlnet xmod"
    ),
    "no MLP, or none that is a linear map to the stream": ("mamba mamba2 falcon_mamba rwkv xlstm"),
    "experts alone, none that every token passes": (
        "dbrx flex_olmo gpt_oss granitemoe granitemoe_swa inkling_text inkling2_text jetmoe longcat_flash "
        "mellum minimax minimax_m2 mixtral olmoe phimoe qwen3_moe"
    ),
    "states or caches that no layer can be run with alone": (
        "bamba blt cpmant deepseek_v4 gemma3n_text hrm_text hy_v4 zamba zamba2"
    ),
    "multimodal shells, whose parts were not built small": (
        "beam dots3_note emu3 fuyu gemma3 gemma3n gemma4 gemma4_assistant gemma4_unified "
        "gemma4_unified_assistant got_ocr2 llama4 mllama moss_transcribe_diarize phi4_multimodal qwen3_5 "
        "qwen3_5_moe"
    ),
    "not built small: configurations that want what is not known here": (
        "cohere_compass_text deepseek_v2 dots1 dots3_note_text falcon_h1 gemma4_text gemma4_unified_text "
        "qwen4_exp qwen4_exp_text zaya"
    ),
}
"""Types that these tests do not edit, by the reason."""
