"""Free continuations."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lit_edit.models.adapter import ModelAdapter
from lit_edit.tokens import encode, pad_token


def continue_greedily(adapter: ModelAdapter, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int) -> str:
    """Return the model's most probable continuation of a prompt, ``tokens`` tokens at most, without the prompt."""
    route = adapter.routes([prompt])[0]
    ids = torch.tensor([encode(tokenizer, route.context + prompt)], device=adapter.device)
    greedy: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    rows = (route.adapter or adapter).generate(ids, max_new_tokens=tokens, pad_token_id=pad_token(tokenizer), **greedy)
    return str(tokenizer.decode(rows[0, ids.shape[1] :], skip_special_tokens=True)).strip()
