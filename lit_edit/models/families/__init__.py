"""One small file per architecture family; nothing else in the package knows a module path."""

from lit_edit.models.families import (
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    gptj,
    llama,
    mistral,
    opt,
    phi3,
    qwen2,
    qwen3,
)
from lit_edit.models.spec import ArchSpec

SPECS: tuple[ArchSpec, ...] = tuple(
    family.SPEC for family in (gpt2, gptj, gpt_neox, opt, llama, mistral, qwen2, qwen3, gemma2, gemma3, phi3)
)

__all__ = ["SPECS"]
