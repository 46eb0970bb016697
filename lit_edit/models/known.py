"""What a model looks like, without its weights: from its own ``config.json``, or from a table of well-known models."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lit_edit.files.hub import hub_fault, reaching_hub
from lit_edit.models.language_model import LanguageModel
from lit_edit.models.packaged import PACKAGED, ModelUnavailableError


def _decoder(
    model_type: str,
    vocabulary: int,
    width: int,
    layers: int,
    heads: tuple[int, int],
    d_ff: int,
    dtype: str,
    **more: Any,
) -> Mapping[str, Any]:
    """Return the configuration of a model built like Llama; ``heads`` are those of queries, and of keys and values."""
    return {
        "model_type": model_type,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "intermediate_size": d_ff,
        "tie_word_embeddings": False,
        "dtype": dtype,
        **more,
    }


_GPT2_XL = {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 1600, "n_layer": 48, "n_head": 25}

KNOWN: Mapping[str, Mapping[str, Any]] = {
    "smollm2-135m": _decoder("llama", 49152, 576, 30, (9, 3), 1536, "float32", tie_word_embeddings=True),
    "gemma3-270m": {
        **_decoder("gemma3_text", 262144, 640, 18, (4, 1), 2048, "float32", tie_word_embeddings=True),
        "head_dim": 256,
        "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 3,
    },
    "meta-llama/Meta-Llama-3-8B": _decoder("llama", 128256, 4096, 32, (32, 8), 14336, "bfloat16"),
    "meta-llama/Meta-Llama-3-70B": _decoder("llama", 128256, 8192, 80, (64, 8), 28672, "bfloat16"),
    "meta-llama/Llama-2-7b-hf": _decoder("llama", 32000, 4096, 32, (32, 32), 11008, "float16"),
    "Qwen/Qwen2.5-7B": _decoder("qwen2", 152064, 3584, 28, (28, 4), 18944, "bfloat16"),
    "EleutherAI/gpt-j-6B": {
        "model_type": "gptj",
        "vocab_size": 50400,
        "n_embd": 4096,
        "n_layer": 28,
        "n_head": 16,
        "rotary_dim": 64,
        "tie_word_embeddings": False,
        "dtype": "float32",
    },
    "gpt2-xl": _GPT2_XL,
    "openai-community/gpt2-xl": _GPT2_XL,
}
"""Architectures by name, as their ``config.json`` has them; only what decides about sizes."""


def find_architecture(model: LanguageModel, source: str | None = None) -> PreTrainedConfig:
    """Return a model's architecture without loading the model, or raise an error that says what to do.

    Looked for in this order: a packaged model or folder on this machine, the hub's cache, :data:`KNOWN`, the hub; by
    the model's name, or by ``source``: a ``config.json``, a folder that has one, or a hub id.
    """
    name = model.name if source is None else source
    kept = name in PACKAGED and PACKAGED[name].is_cached
    path = str(PACKAGED[name].folder) if kept else os.path.expanduser(name)
    may_be_hub_id = name not in PACKAGED and "/" in name and not name.startswith((".", "/", "~"))
    known = {key.lower(): value for key, value in KNOWN.items()}.get(name.lower())
    if os.path.exists(path):
        return _read(path, model, local=True)
    if may_be_hub_id:
        with suppress(ModelUnavailableError):
            return _read(name, model, local=True)
    if known is not None:
        settings = dict(known)
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    if may_be_hub_id:
        return _read(name, model, local=False)
    raise ModelUnavailableError(f"there is no model {name!r}: {_ADVICE}")


_ADVICE = (
    "name a packaged model, a model folder, a hub id, or one of the models whose sizes are known "
    f"({', '.join(KNOWN)}); or give its config.json with --model-config FILE"
)


def _read(name: str, model: LanguageModel, local: bool) -> PreTrainedConfig:
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        with nullcontext() if local else reaching_hub():
            return AutoConfig.from_pretrained(name, local_files_only=local, **options)
    except Exception as error:  # the hub's client and broken files raise many kinds, which mean the same here
        reason = hub_fault(error).strip().partition("\n")[0]
        raise ModelUnavailableError(f"no config.json can be read for {name!r} ({reason}): {_ADVICE}") from error


def make_meta_model(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return a causal language model on the meta device: all modules and shapes, no numbers and no memory."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a strange configuration makes of the constructors
        reason = str(error).strip().partition("\n")[0]
        raise ModelUnavailableError(
            f"no causal language model can be made of a configuration of type {config.model_type!r} ({reason})"
        ) from error
    made: PreTrainedModel = model.eval().requires_grad_(False)
    return made
