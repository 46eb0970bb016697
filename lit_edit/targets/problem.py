"""What the target optimisation of one edit works on: token rows, no tensors, no model."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lit_edit.data.request import EditRequest
from lit_edit.targets.contexts import Templates
from lit_edit.text.tokens import LocatedPrompt, continuation, locate

KL_PROMPT = "{} is a"
"""The prompt on which the target may not change the model's next word (MEMIT, ROME)."""


@dataclass(frozen=True)
class TargetProblem:
    """One edit as rows of tokens: the prompt in every context, of which the first is the plain prompt, and the target.

    The essence is the prompt of the KL term, up to and including its lookup token.
    """

    prompts: tuple[LocatedPrompt, ...]
    target: tuple[int, ...]
    essence: LocatedPrompt


def build_problem(tokenizer: PreTrainedTokenizerBase, request: EditRequest, templates: Templates) -> TargetProblem:
    """Tokenise one request in all contexts."""
    start, end = request.subject_span
    text = request.prompt.rstrip().replace("{}", request.subject)  # white space at the end belongs to the continuation
    prompts = []
    for template in (t for group in templates for t in group):
        before = template.index("{}")
        prompts.append(locate(tokenizer, template.replace("{}", text), (before + start, before + end)))
    _, target = continuation(tokenizer, text, request.target_new)
    essence = locate(tokenizer, KL_PROMPT.replace("{}", request.subject), (0, len(request.subject)))
    # Causal: nothing after the lookup token bears on its distribution.
    essence = LocatedPrompt(essence.ids[: essence.lookup + 1], essence.lookup)
    return TargetProblem(tuple(prompts), target, essence)
