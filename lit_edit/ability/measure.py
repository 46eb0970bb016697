"""Measuring a model on tasks: by the likelihood of the options, and by what it says."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_edit.ability.files import TaskData
from lit_edit.ability.metrics import NONE, accuracy_change, majority, score_choices
from lit_edit.ability.tasks import Item
from lit_edit.errors import ArgumentError
from lit_edit.metrics.scoring import score_continuations
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.generation import continue_rows
from lit_edit.text.tokens import continuation, encode

NEW_TOKENS = 5  # that a model may say; as the published benchmarks have it

Record = dict[str, Any]
"""One task on one model, as primitives: what :func:`measure_task` returns."""


@dataclass(frozen=True)
class Prompted:
    """The items of a task as they are put to a model."""

    prompts: tuple[str, ...]  # one per item
    items: tuple[Item, ...]  # those that are measured
    shortened: int  # how many have fewer shots than asked for: the model's context has no room for more
    left_out: int  # how many do not fit even without any


def measure_task(
    adapter: ModelAdapter,
    tokenizer: PreTrainedTokenizerBase,
    data: TaskData,
    shots: int = 0,
    limit: int | None = 100,
    generation: bool = True,
) -> Record:
    """Measure a model (or a view of it) on one task: metrics with intervals, counts, and each answer.

    Each of the first ``limit`` questions has some answered ones in front of it, its ``shots``; with ``generation`` the
    model also answers freely.

    Raises:
        ArgumentError: If no item fits into the model's context.
    """
    context = getattr(adapter.model.config, "max_position_embeddings", None)
    asked = ask(data, tokenizer, shots, limit, context)
    if not asked.items:
        raise ArgumentError(
            f"no item of {data.task.name} fits into the model's context of {context} tokens: leave this task out"
        )
    gold, options = [item.gold for item in asked.items], data.task.options
    if generation:
        chosen, texts = choose_and_say(adapter, tokenizer, asked.prompts, options)
    else:
        chosen, texts = choose(adapter, tokenizer, asked.prompts, options), []
    record: Record = {
        "items": len(gold),
        "shots": shots,
        "shortened": asked.shortened,
        "left_out": asked.left_out,
        "majority": majority(gold),
        "likelihood": score_choices(gold, chosen, len(options)),
        "answers": {"gold": gold, "likelihood": chosen},
    }
    if generation:
        said = [parse_option(text, options) for text in texts]
        record["generation"] = {**score_choices(gold, said, len(options)), "unparsable": said.count(NONE)}
        record["answers"]["generation"] = said
    return record


def measure_tasks(
    adapter: ModelAdapter,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[TaskData],
    shots: int = 0,
    limit: int | None = 100,
    generation: bool = True,
    status: Callable[[str], None] = lambda message: None,
) -> dict[str, Record]:
    """Return :func:`measure_task` of several tasks by their names; ``status`` is told which is being measured."""
    records = {}
    for number, data in enumerate(tasks, 1):
        status(f"general ability: {data.task.name} ({number} of {len(tasks)})")
        records[data.task.name] = measure_task(adapter, tokenizer, data, shots, limit, generation)
    return records


def ask(
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    shots: int = 0,
    limit: int | None = None,
    context: int | None = None,
) -> Prompted:
    """Return the prompts of a task's first ``limit`` items, as they fit into a context of so many tokens.

    Of the shots, those farthest from the question are dropped where there is no room for them.
    """
    options = max(len(encode(tokenizer, f" {option}")) for option in data.task.options)
    room = None if context is None else context - max(NEW_TOKENS, options)
    prompts, items, shortened = [], [], 0
    wanted = data.items[:limit]
    for item in wanted:
        for first in range(len(data.shots[:shots]) + 1):
            prompt = data.task.prompt(item, data.shots[first:shots])
            if room is None or len(encode(tokenizer, prompt)) <= room:
                prompts.append(prompt)
                items.append(item)
                shortened += len(data.shots[first:shots]) < shots
                break
    return Prompted(tuple(prompts), tuple(items), shortened, len(wanted) - len(items))


def choose(
    adapter: ModelAdapter, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], options: Sequence[str]
) -> list[int]:
    """Return, per prompt, the index of the option with the smallest nll per token (the first one of equal ones)."""
    pairs = [(prompt, option) for prompt in prompts for option in options]
    nlls = [score.nll for score in score_continuations(adapter, tokenizer, pairs)]
    rows = [nlls[start : start + len(options)] for start in range(0, len(nlls), len(options))]
    return [row.index(min(row)) for row in rows]


@torch.no_grad()
def choose_and_say(
    adapter: ModelAdapter, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], options: Sequence[str]
) -> tuple[list[int], list[str]]:
    """Return what :func:`choose` does, and the model's own continuations, with one pass over each prompt.

    Continuations are greedy, :data:`NEW_TOKENS` tokens long or up to the end token. Where each option is one token its
    likelihood is read where the continuation begins; the prompts where one is not are scored apart.
    """
    chosen: dict[str, int] = {}
    texts: dict[str, str] = {}
    for model, context_of in adapter.by_route(list(dict.fromkeys(prompts))):
        rows = [encode(tokenizer, context + prompt) for prompt, context in context_of.items()]
        heads = [
            _single_tokens(tokenizer, context + prompt, options, row)
            for row, (prompt, context) in zip(rows, context_of.items(), strict=True)
        ]
        likelihoods = torch.zeros(len(rows), len(options), dtype=torch.float64)  # those of other ranks' rows are zero

        def look(index: int, logits: Tensor, heads: Any = heads, likelihoods: Tensor = likelihoods) -> None:
            if heads[index] is not None:
                likelihoods[index] = torch.log_softmax(logits, -1)[heads[index]].to(likelihoods)

        written = continue_rows(model, rows, [NEW_TOKENS] * len(rows), look=look)
        adapter.ranks.sum_(likelihoods)
        texts |= {prompt: _text(tokenizer, new) for prompt, new in zip(context_of, written, strict=True)}
        best = [row.index(max(row)) for row in likelihoods.tolist()]  # the first one of equal ones
        chosen |= {prompt: index for prompt, index, head in zip(context_of, best, heads, strict=True) if head}
    rest = [prompt for prompt in texts if prompt not in chosen]
    chosen |= dict(zip(rest, choose(adapter, tokenizer, rest, options), strict=True))
    return [chosen[prompt] for prompt in prompts], [texts[prompt] for prompt in prompts]


def _single_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: str, options: Sequence[str], row: Sequence[int]
) -> list[int] | None:
    """Return the token of each option behind a prompt, or nothing where one has several or changes the prompt's own."""
    pairs = [continuation(tokenizer, prompt, option) for option in options]
    fits = all(len(target) == 1 and begin == tuple(row) for begin, target in pairs)
    return [target[0] for _, target in pairs] if fits else None


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    kept = list(takewhile(lambda token: token != tokenizer.eos_token_id, ids))
    return str(tokenizer.decode(kept, skip_special_tokens=True))


def parse_option(text: str, options: Sequence[str]) -> int:
    """Return which option a text names, or :data:`NONE` if it is none or more than one.

    Only its first line that is not empty counts: what follows is mostly the next question, invented. Words may stand
    anywhere in it, in any case; letters must stand alone or before punctuation (``B``, ``(B)``, ``B. Paris``), and be
    capital letters but at the start (``b)``), so that the article in "A dog" is no answer.

    Example:
        >>> parse_option(" Yes, they", ("No", "Yes")), parse_option(" True or False", ("False", "True"))
        (1, -1)
        >>> parse_option(" (B) Paris", ("A", "B", "C", "D"))
        1
    """
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    if all(len(option) == 1 for option in options):
        names = re.findall(r"(?<![\w'])([A-Z])(?=\s*$|[).:,;\]])", line[:1].upper() + line[1:])
        named = {index for index, option in enumerate(options) if option in names}
    else:
        words = re.findall(r"[^\W_]+", line.casefold())
        named = {index for index, option in enumerate(options) if option.casefold() in words}
    return named.pop() if len(named) == 1 else NONE


def compare_records(before: Record, after: Record) -> dict[str, dict[str, float]]:
    """Return how one task's accuracy has changed, by likelihood and by generation, each with its interval."""
    gold = before["answers"]["gold"]
    ways = [way for way in ("likelihood", "generation") if way in before and way in after]
    if after["answers"]["gold"] != gold:
        raise ValueError("the two measurements are not of the same items")
    return {way: accuracy_change(gold, before["answers"][way], after["answers"][way]) for way in ways}
