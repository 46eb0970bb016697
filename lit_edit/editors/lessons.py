"""What a model is taught for an edit, and the loss of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lit_edit.models.packed import TokenRows
from lit_edit.text.tokens import continuation, pad_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lit_edit.models.adapter import ModelAdapter
    from lit_edit.models.memory import Memory

Loss = Literal["prompt_last", "target"]


@dataclass(frozen=True)
class Lesson:
    """A row of tokens, and what the model is to say after some of them.

    Attributes:
        ids: What is read.
        places: Positions in the row whose next word is taught, perhaps several times the same.
        words: What is to be said there, one token per place.
    """

    ids: tuple[int, ...]
    places: tuple[int, ...]
    words: tuple[int, ...]


def target_lesson(prompt: Sequence[int], target: Sequence[int], loss: Loss = "target") -> Lesson:
    """Return where the tokens of a target, as they follow the prompt, are taught.

    With the loss ``target`` each is taught after those before it, with ``prompt_last`` all of them after the prompt.

    Example:
        >>> target_lesson([1, 2, 3], [7, 8])
        Lesson(ids=(1, 2, 3, 7), places=(2, 3), words=(7, 8))
        >>> target_lesson([1, 2, 3], [7, 8], "prompt_last")
        Lesson(ids=(1, 2, 3), places=(2, 2), words=(7, 8))
    """
    last = len(prompt) - 1
    if loss == "prompt_last":
        return Lesson(tuple(prompt), (last,) * len(target), tuple(target))
    return Lesson((*prompt, *target[:-1]), tuple(range(last, last + len(target))), tuple(target))


class LessonLoss:
    r"""The loss of some edits, each with its lessons, as a function of the weights of a few layers.

    An edit's loss is the mean of :math:`-\log p(w)` over all the places of its lessons. What lies below ``first``, the
    lowest layer whose weights will vary, is run here, once.
    """

    def __init__(self, adapter: ModelAdapter, lessons: Sequence[Sequence[Lesson]], first: int, pad: int) -> None:
        self.adapter, self.first = adapter, first
        flat = [(edit, lesson) for edit, own in enumerate(lessons) for lesson in own]
        with torch.no_grad():
            self.line = TokenRows(adapter, [lesson.ids for _, lesson in flat], pad).line()
            self.hidden = self.line.run(self.line.hidden, 0, first)
        device = self.hidden.device
        where = [self.line.index(row, place) for row, (_, lesson) in enumerate(flat) for place in lesson.places]
        owner = torch.tensor([edit for edit, lesson in flat for _ in lesson.words], device=device)
        self.where = torch.tensor(where, device=device)
        self.words = torch.tensor([word for _, lesson in flat for word in lesson.words], device=device)
        self.own = owner == torch.arange(len(lessons), device=device)[:, None]  # (edits, places)

    def states(self, view: ModelAdapter) -> Tensor:
        """Return the last states ``(places, d_model)`` of a view of the model at all places of all lessons."""
        hidden = self.line.run(self.hidden, self.first, view.n_layers, adapter=view)
        return view.finish(hidden[self.where])

    def __call__(self, weights: Mapping[str, Tensor], memory: Memory | None = None) -> Tensor:
        """Return the losses ``(edits,)`` with some weights in place of the model's, or with a memory."""
        view = self.adapter.with_weights(weights)
        view = view if memory is None else view.with_memory(memory)
        logits = view.logits(self.states(view))
        nll = torch.nn.functional.cross_entropy(logits, self.words, reduction="none")
        own = self.own.to(nll)
        return own @ nll / own.sum(1)


def probabilities(before: float, after: float) -> dict[str, float]:
    """Return what the ledger tells of an edit whose target had the one mean loss, and then the other."""
    return {
        "target_probability_before": math.exp(-before),
        "target_probability": math.exp(-after),
        "target_loss": after,
    }


@torch.no_grad()
def target_probability(adapter: ModelAdapter, tokenizer: PreTrainedTokenizerBase, text: str, target: str) -> float:
    """Return the probability of a target after a text, the geometric mean over its tokens; no memory is asked."""
    prompt, words = continuation(tokenizer, text, target)
    loss_of = LessonLoss(adapter, [[target_lesson(prompt, words)]], 0, pad_token(tokenizer))
    return float(torch.exp(-loss_of({})[0]))
