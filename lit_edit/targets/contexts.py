"""Context templates: the texts before a prompt that make keys and targets robust against what precedes it.

Two groups, as in MEMIT: the plain prompt, and prompts behind short texts that the unedited model wrote itself. A key is
the mean of the group means, so the plain prompt weighs as much as all prefixed ones together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from transformers import PreTrainedTokenizerBase

from lit_edit.errors import ArgumentError
from lit_edit.models.adapter import ModelAdapter
from lit_edit.text.tokens import encode, pad_token

Templates: TypeAlias = tuple[tuple[str, ...], ...]
"""Groups of templates, each with one ``{}`` for the filled prompt."""

STARTS = ("The", "Therefore", "Because", "I", "You")
"""The words from which MEMIT's code lets the model go on."""

PLAIN: Templates = (("{}",),)


def check_templates(templates: Sequence[Sequence[str]]) -> Templates:
    """Return the groups as tuples, or raise ``ValueError`` for what cannot be contexts.

    Example:
        >>> check_templates([["{}"], ["Well. {}"]])
        (('{}',), ('Well. {}',))
    """
    groups = tuple(tuple(group) for group in templates)
    if not groups or not all(groups):
        raise ValueError(f"contexts must be groups of at least one template each, got {templates!r}")
    for template in (t for group in groups for t in group):
        if template.count("{}") != 1:
            raise ValueError(f"a context template needs exactly one {{}} for the prompt, got {template!r}")
    if groups[0][0] != "{}":
        raise ValueError(f"the first context template must be the plain prompt '{{}}', got {groups[0][0]!r}")
    return groups


def group_weights(templates: Templates) -> list[float]:
    """Return the weight of each template, in order: equal over groups, equal within a group.

    Example:
        >>> group_weights((("{}",), ("A. {}", "B. {}")))
        [0.5, 0.25, 0.25]
    """
    return [1.0 / len(templates) / len(group) for group in templates for _ in group]


def sample_templates(
    adapter: ModelAdapter,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    starts: Sequence[str] = STARTS,
    length: int = 10,
    top_k: int = 5,
) -> Templates:
    """Let the unedited model write a short text per start word (MEMIT: ten tokens in all, the start included; top-k 5).

    The global random state is left as it was.
    """
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**63 - len(starts):
        raise ArgumentError(f"the seed of the contexts (model.editor.init_args.seed) must fit 64 bits, got {seed}")
    texts = []
    for number, start in enumerate(starts):
        ids = torch.tensor([encode(tokenizer, start)], device=adapter.device)
        new = max(1, length - ids.shape[1])
        rows = adapter.generate(
            ids, seed=seed + number, do_sample=True, top_k=top_k, max_new_tokens=new, pad_token_id=pad_token(tokenizer)
        )
        text = str(tokenizer.decode(rows[0], skip_special_tokens=True))
        texts.append(" ".join(text.replace("{", " ").replace("}", " ").split()))
    return (*PLAIN, tuple(f"{text}. {{}}" for text in texts))
