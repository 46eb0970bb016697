"""From text to token ids: prompts with their lookup token, and continuations.

Everything is done on offset mappings of the filled text. Counting tokens of pieces breaks with byte-order marks of
SentencePiece, leading spaces and BOS tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_edit.data.request import DataError
from lit_edit.errors import shorten


@dataclass(frozen=True)
class LocatedPrompt:
    """Token ids of a prompt and the index of its lookup token (the last token of the subject)."""

    ids: tuple[int, ...]
    lookup: int


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ``ValueError`` for tokenizers that cannot tell where a token lies in the text."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} is a slow tokenizer without offset mapping, which lit-edit needs to find the "
            "subject's last token; load it with AutoTokenizer.from_pretrained(..., use_fast=True)"
        )


@lru_cache(maxsize=8)
def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the special tokens that the tokenizer puts before every text (BOS, for many models)."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return tuple(full[:start])
    return ()


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Return the ids of a text to be continued: leading special tokens, no trailing ones."""
    return leading_tokens(tokenizer) + tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def locate(tokenizer: PreTrainedTokenizerBase, text: str, span: tuple[int, int]) -> LocatedPrompt:
    """Tokenise a filled prompt and find the token that covers the last character of ``span``, that of the subject."""
    lead = leading_tokens(tokenizer)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    last = span[1] - 1
    covering = [i for i, (start, end) in enumerate(encoding["offset_mapping"]) if start <= last < end]
    if not covering:
        raise DataError(
            f"no token covers the end of the subject {shorten(text[slice(*span)])!r} in {shorten(text)!r}: this "
            "tokenizer leaves out what stands there"
        )
    # A character of several bytes may be split over several tokens; the subject ends with the last of them.
    return LocatedPrompt(lead + tuple(encoding["input_ids"]), len(lead) + covering[-1])


def continuation(
    tokenizer: PreTrainedTokenizerBase, prompt: str, target: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids of a prompt and those of ``target`` as they follow it.

    Prompt and target, joined by a space, are tokenised together and cut where the target begins. Where a token spans
    the border, both are tokenised apart, the target with its leading space.

    Example:
        >>> from lit_edit.testing import tiny_tokenizer
        >>> tokenizer = tiny_tokenizer()
        >>> prompt, target = continuation(tokenizer, "The capital of Italy is", "Rome")
        >>> tokenizer.decode(target)
        ' Rome'
    """
    prompt = prompt.rstrip()
    target = target.strip()
    lead = leading_tokens(tokenizer)
    encoding = tokenizer(f"{prompt} {target}", add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    heard = any(end > len(prompt) + 1 for _, end in offsets)  # more than the space
    if not heard or not (lead or alone):
        raise DataError(f"this tokenizer makes no token of {shorten(prompt if heard else target)!r}")
    if ids[: len(alone)] == alone and len(ids) > len(alone):
        return lead + tuple(alone), tuple(ids[len(alone) :])
    cut = next((i for i, (start, end) in enumerate(offsets) if end > len(prompt)), len(ids))
    if 0 < cut < len(ids) and offsets[cut][0] >= len(prompt):
        return lead + tuple(ids[:cut]), tuple(ids[cut:])
    return lead + tuple(alone), tuple(tokenizer(f" {target}", add_special_tokens=False)["input_ids"])


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return an id to pad with; padding is always masked, so any will do when the tokenizer names none."""
    tokens = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in tokens if token is not None), 0)


def pad_right(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ``input_ids`` and ``attention_mask`` ``(batch, time)`` of rows padded on the right."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return ids, mask
