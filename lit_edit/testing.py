"""Tiny random models of every family, with a tokenizer: for tests, doctests and trying things out in milliseconds."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lit_edit.data.request import EditRequest, Probe

_COMMON = {"vocab_size": 400, "hidden_size": 32, "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {
    **_COMMON,
    "num_hidden_layers": 4,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "head_dim": 8,
}
_GPT = {
    "vocab_size": 400,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT,
    "gptj": {**_GPT, "rotary_dim": 4},
    "gpt_neox": {**_COMMON, "num_hidden_layers": 4, "intermediate_size": 48, "max_position_embeddings": 128},
    "opt": {
        **_COMMON,
        "num_hidden_layers": 4,
        "ffn_dim": 48,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 32,
        "pad_token_id": 0,
    },
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 6},
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": {**_LLAMA, "query_pre_attn_scalar": 8, "sliding_window": 6},
    "gemma3_text": {**_LLAMA, "query_pre_attn_scalar": 8, "sliding_window": 6},
    "phi3": _LLAMA,
}
"""Configurations by ``config.model_type``; sliding windows are short enough to matter in a test sentence."""


def tiny_model(
    model_type: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any
) -> PreTrainedModel:
    """Return a random model of four layers, in evaluation mode and frozen; the global random state is left alone.

    Example:
        >>> tiny_model("gpt2").config.n_layer
        4
    """
    config = AutoConfig.for_model(model_type, **{**TINY_CONFIGS[model_type], "initializer_range": 0.1, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # biases and norms start at constants; random ones test more
            if parameter.dim() == 1:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval().requires_grad_(False)


@lru_cache(maxsize=1)
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of 400 tokens; any text can be encoded.

    Example:
        >>> tiny_tokenizer().decode(tiny_tokenizer()("Zürich is")["input_ids"])
        'Zürich is'
    """
    text = " ".join(f"{r.text} {r.target_new} {r.target_true}" for r in tiny_requests())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")  # noqa: S106


def tiny_requests() -> list[EditRequest]:
    """Return six requests with probes of every kind."""
    rows = (
        ("The capital of {} is", "Italy", "Rome", "Vienna", "Spain", "Madrid"),
        ("The mother tongue of {} is", "Marie Curie", "Polish", "Greek", "Chopin", "Polish"),
        ("{} plays the sport of", "Serena Williams", "tennis", "chess", "Roger Federer", "tennis"),
        ("The book {} was written by", "Hamlet", "Shakespeare", "Jules Verne", "Emma", "Jane Austen"),
        ("{} is located in", "Mount Fuji", "Japan", "Chile", "Kyoto", "Japan"),
        ("The headquarters of {} are in", "Nokia", "Finland", "Brazil", "Volvo", "Sweden"),
    )
    return [
        EditRequest(
            id=str(number),
            prompt=prompt,
            subject=subject,
            target_new=new,
            target_true=true,
            paraphrases=(f"Well, {prompt.replace('{}', subject)}",),
            neighborhood=(Probe(prompt.replace("{}", other), answer),),
            generation=(f"{subject} is",),
        )
        for number, (prompt, subject, true, new, other, answer) in enumerate(rows)
    ]
