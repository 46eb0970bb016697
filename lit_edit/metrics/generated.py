"""Measuring what an edited model writes: fluency, consistency and generated answers, beside teacher forcing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_edit.data.request import EditRequest
from lit_edit.metrics.ages import mean_of_known
from lit_edit.metrics.classes import Agreement, ExactAccuracy, ExactMatch, PortabilityAccuracy, TokenAccuracy
from lit_edit.metrics.evaluation import value_of
from lit_edit.metrics.scoring import score_continuations
from lit_edit.metrics.texts import consistency, fluency
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.generation import continue_rows
from lit_edit.text.tokens import continuation, encode, leading_tokens

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

ASKED = ("efficacy", "generalization")


@dataclass(frozen=True)
class Answer:
    """What a model said when it was asked for an object, greedily, in as many tokens as the object has."""

    text: str
    target: str  # what it should have said
    hits: tuple[bool, ...]  # per token, whether it is the object's


@dataclass(frozen=True)
class GenerationResult:
    """What one edit's prompts make a model write."""

    id: str  # of the edit
    texts: tuple[str, ...]  # of its generation prompts, the prompts included
    fluency: float | None  # of the texts, in bits; None without any
    consistency: float | None  # of the texts with the references; None without any of either
    efficacy: tuple[Answer, ...]  # the answer to the edit's own prompt
    generalization: tuple[Answer, ...]  # the answers to its paraphrases

    def as_state(self) -> dict[str, Any]:
        """Return the result as primitives, without the texts."""
        return {**asdict(self), "texts": ()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> GenerationResult:
        """Restore :meth:`as_state`."""
        asked = {kind: tuple(Answer(a["text"], a["target"], tuple(a["hits"])) for a in state[kind]) for kind in ASKED}
        return cls(**{**state, "texts": tuple(state["texts"]), **asked})


@dataclass(frozen=True)
class ByKindResult:
    """What one edit's probes by kind show, under teacher forcing; by kind, then per prompt and token of its answer."""

    id: str  # of the edit
    portability: Mapping[str, tuple[tuple[bool, ...], ...]]  # whether the token is the model's first choice
    locality: Mapping[str, tuple[tuple[bool, ...], ...]]  # the same of further prompts that the edit must leave alone
    choices: Mapping[str, tuple[tuple[int, ...], ...]]  # of these the first choices themselves


def evaluate_generation(
    adapter: ModelAdapter,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    seed: int = 0,
    top_k: int = 5,
    length: int = 100,
    max_prompts: int | None = None,
    vectorizer: TfidfVectorizer | None = None,
    batch_rows: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> list[GenerationResult]:
    """Let a model write, and measure what it writes.

    Each generation prompt is continued by drawing from the ``top_k`` most probable tokens until the text has
    ``length`` tokens, the prompt's included, as CounterFact was published. What is drawn depends on the seed, the
    edit's id and the number of the prompt alone: the same edits can be measured before and after with the same luck.
    Prompt and paraphrases are also answered greedily.

    Args:
        adapter: The model (or a view of it).
        tokenizer: Its tokenizer.
        requests: The edits.
        seed: Seeds the drawing.
        top_k: Draw from this many.
        length: Tokens of a text, at most.
        max_prompts: Generation prompts per edit, the first ones; by default all.
        vectorizer: Term weights for consistency, of edits with references.
        batch_rows: Texts that are written together.
        progress: Receives how many texts are written, of how many.

    Returns:
        One result per request, in order.
    """
    prompts = [request.generation[:max_prompts] for request in requests]
    flat = [prompt for group in prompts for prompt in group]
    rows = [encode(tokenizer, prompt)[:length] for prompt in flat]
    seeds = [f"{seed}|{r.id}|{n}" for r, group in zip(requests, prompts, strict=True) for n in range(len(group))]
    new = [length - len(row) if row else 0 for row in rows]
    written: dict[int, tuple[int, ...]] = {}
    for model, context_of in adapter.by_route(list(dict.fromkeys(flat))):
        places = [index for index, prompt in enumerate(flat) if prompt in context_of]
        found = continue_rows(
            model,
            [_behind(tokenizer, context_of[flat[i]], rows[i]) for i in places],
            [new[i] for i in places],
            top_k,
            [seeds[i] for i in places],
            batch_rows,
            progress,
        )
        written |= zip(places, found, strict=True)
    decoded = (_decode(tokenizer, row + written[index]) for index, row in enumerate(rows))
    pairs = [(prompt, request.target_new) for request in requests for prompt in (request.text, *request.paraphrases)]
    said = iter(answer_greedily(adapter, tokenizer, pairs, batch_rows))
    results = []
    for request, group in zip(requests, prompts, strict=True):
        texts = tuple(islice(decoded, len(group)))
        compared = vectorizer is not None and texts and request.references
        results.append(
            GenerationResult(
                request.id,
                texts,
                fluency=fluency(texts) if texts else None,
                consistency=consistency(texts, request.references, vectorizer) if compared else None,
                efficacy=(next(said),),
                generalization=tuple(islice(said, len(request.paraphrases))),
            )
        )
    return results


def answer_greedily(
    adapter: ModelAdapter,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    batch_rows: int = 64,
) -> list[Answer]:
    """Let a model answer prompts greedily, in exactly as many tokens as the wanted object has.

    Args:
        adapter: The model.
        tokenizer: Its tokenizer.
        pairs: ``(prompt, object)``.
        batch_rows: Answers that are written together.

    Returns:
        The answers, in order.
    """
    unique = list(dict.fromkeys(pairs))
    answers = {}
    for model, context_of in adapter.by_route(list(dict.fromkeys(prompt for prompt, _ in unique))):
        own = [pair for pair in unique if pair[0] in context_of]
        tokens = [continuation(tokenizer, context_of[prompt] + prompt, target) for prompt, target in own]
        written = continue_rows(model, [p for p, _ in tokens], [len(t) for _, t in tokens], batch_rows=batch_rows)
        for pair, (_, wanted), said in zip(own, tokens, written, strict=True):
            hits = tuple(a == b for a, b in zip(said, wanted, strict=True))
            answers[pair] = Answer(_decode(tokenizer, said).strip(), pair[1], hits)
    return [answers[pair] for pair in pairs]


def evaluate_portability(
    adapter: ModelAdapter, tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest]
) -> list[ByKindResult]:
    """Measure what follows from the edits and must now be answered otherwise, and further locality, by kind.

    Args:
        adapter: The model (or a view of it).
        tokenizer: Its tokenizer.
        requests: The edits.

    Returns:
        One result per request, in order.
    """
    groups = [probes for r in requests for kinds in (r.portability, r.locality) for probes in kinds.values()]
    pairs = [(probe.prompt, probe.answer) for probes in groups for probe in probes]
    scores = dict(zip(pairs, score_continuations(adapter, tokenizer, pairs), strict=True))

    def of(kinds: Mapping[str, Any], what: str) -> dict[str, tuple[Any, ...]]:
        return {
            kind: tuple(tuple(getattr(scores[probe.prompt, probe.answer], what).tolist()) for probe in probes)
            for kind, probes in kinds.items()
            if probes
        }

    return [
        ByKindResult(r.id, of(r.portability, "hits"), of(r.locality, "hits"), of(r.locality, "choice"))
        for r in requests
    ]


def summarise_generation(results: Iterable[GenerationResult]) -> dict[str, Any]:
    """Return the means over edits.

    Returns:
        ``{"fluency", "consistency", "generation": {"efficacy": {"token_accuracy", "accuracy", "exact_match"},
        "generalization": ...}}``; a value is ``None`` where no edit has what it takes.
    """
    results = list(results)
    asked: dict[str, Any] = {}
    alone = {"sync_on_compute": False}  # every rank has all results
    for kind in ASKED:
        tokens, whole, match = TokenAccuracy(**alone), ExactAccuracy(**alone), ExactMatch(**alone)
        for result in results:
            answers: tuple[Answer, ...] = getattr(result, kind)
            if answers:
                hits = [torch.tensor(answer.hits) for answer in answers]
                tokens.update(hits)
                whole.update(hits)
                match.update([answer.text for answer in answers], answers[0].target)
        metrics = {"token_accuracy": tokens, "accuracy": whole, "exact_match": match}
        asked[kind] = {name: value_of(metric) for name, metric in metrics.items()}
    return {
        "fluency": mean_of_known(r.fluency for r in results),
        "consistency": mean_of_known(r.consistency for r in results),
        "generation": asked,
    }


def summarise_portability(
    results: Iterable[ByKindResult], before: Mapping[str, ByKindResult] | None = None
) -> dict[str, Any]:
    """Return the means over edits, by kind.

    Args:
        results: The edits' results on some model.
        before: Their results on the unedited model, by id, for agreement.

    Returns:
        ``{"portability": {kind: accuracy of tokens}, "locality_by_kind": {kind: {"token_accuracy", "agreement"}}}``,
        without what no edit has.
    """
    results, before = list(results), before or {}
    portability = _by_kind([r.portability for r in results])
    locality = _by_kind([r.locality for r in results])
    kinds: dict[str, Any] = {kind: {"token_accuracy": value} for kind, value in locality.items()}
    for kind in kinds:
        agreement = Agreement(sync_on_compute=False)
        for r in results:
            if kind in r.choices and r.id in before:
                agreement.update(_tensors(before[r.id].choices[kind]), _tensors(r.choices[kind]))
        if (value := value_of(agreement)) is not None:
            kinds[kind]["agreement"] = value
    return {name: found for name, found in (("portability", portability), ("locality_by_kind", kinds)) if found}


def _by_kind(hits: Sequence[Mapping[str, Sequence[Sequence[bool]]]]) -> dict[str, float]:
    metric = PortabilityAccuracy(list(dict.fromkeys(kind for part in hits for kind in part)), sync_on_compute=False)
    for part in hits:
        metric.update({kind: _tensors(rows) for kind, rows in part.items()})
    return metric.compute() if metric.kinds else {}


def _tensors(rows: Sequence[Sequence[int]]) -> list[Tensor]:
    return [torch.tensor(row) for row in rows]


def _behind(tokenizer: PreTrainedTokenizerBase, context: str, row: Sequence[int]) -> tuple[int, ...]:
    """Return a row behind a context; special tokens at its beginning stand before the context then."""
    if not context:
        return tuple(row)
    return encode(tokenizer, context) + tuple(row[len(leading_tokens(tokenizer)) :])


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
