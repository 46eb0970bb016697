"""Causal tracing of one fact: what restoring single states, or windows of modules, brings back of the answer.

Meng et al. 2022 (ROME, arXiv 2202.05262, section 2 and appendix B). A clean run and runs with noise on the subject's
embeddings are made together. Then, in the noisy runs, the clean value is put back at one token: the hidden state behind
one layer, or what the MLPs (the attentions) of a window of layers around it add. How probable the answer becomes again
is the indirect effect of that place.

What does not change is not computed again: a restoration at a layer starts from the noisy states that enter it, and one
at a token leaves all tokens before it as they were (their attention keys and values are kept). All tokens and all noise
samples of a layer run as one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lit_edit.models.adapter import ModelAdapter
from lit_edit.studies.tracing.line import KeyValues, PromptCalls, PromptLine
from lit_edit.studies.tracing.noise import noisy_embeddings
from lit_edit.studies.tracing.prompts import TokenizedFact
from lit_edit.studies.tracing.restoring import only_at, reading, restoring, rounding_once

Kind = Literal["hidden", "mlp", "attn"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""What is restored: one hidden state, or MLP or attention outputs over a window of layers."""

MOST_TOKENS = 16_384
"""Tokens of one restoration run together; longer prompts are traced a few positions at a time."""

MOST_TOGETHER = 2_048
"""Tokens of several restorations run together: enough to hide what a call costs, few enough for a CPU's caches."""


@dataclass(frozen=True)
class FactTrace:
    """What tracing one fact found.

    Attributes:
        id: The fact's.
        prompt: Its text.
        tokens: Texts of the prompt's tokens.
        subject: Index of the subject's first token, and index behind its last.
        answer: The model's most probable next token, whose probability is traced.
        p_clean: Its probability.
        p_corrupt: Its mean probability over the noise samples.
        restored: By kind, ``[layer][token]``: its mean probability with a clean state put back. Tokens are counted from
            the subject's first: before it nothing is corrupted, and restoring changes nothing.
    """

    id: str
    prompt: str
    tokens: tuple[str, ...]
    subject: tuple[int, int]
    answer: str
    p_clean: float
    p_corrupt: float
    restored: Mapping[str, tuple[tuple[float, ...], ...]]

    def effects(self, kind: str) -> tuple[tuple[float, ...], ...]:
        """Return indirect effects ``[layer][token from the subject on]``: restored less corrupted probability."""
        return tuple(tuple(p - self.p_corrupt for p in row) for row in self.restored[kind])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FactTrace:
        """Restore a trace from its fields after a way through JSON; of others than its own nothing is made."""
        layers = {str(kind): tuple(tuple(map(float, row)) for row in rows) for kind, rows in values["restored"].items()}
        first, behind = map(int, values["subject"])
        made = {"tokens": tuple(values["tokens"]), "subject": (first, behind), "restored": layers}
        return cls(**{**values, **made, **{name: float(values[name]) for name in ("p_clean", "p_corrupt")}})


def window_around(layer: int, width: int, n_layers: int) -> tuple[int, int]:
    """Return the window of layers ``start .. stop - 1`` around a layer, cut off at the model's ends.

    Example:
        >>> window_around(10, 10, 30), window_around(2, 10, 30), window_around(7, 1, 30), window_around(7, 3, 30)
        ((5, 15), (0, 7), (7, 8), (6, 9))
    """
    return max(0, layer - width // 2), min(n_layers, layer - width // 2 + width)


@dataclass(frozen=True)
class _Runs:
    """The clean run (version 0) and the noisy ones."""

    states: list[Tensor]  # by layer, its input (versions, length, d_model); behind the last layer its output
    kept: dict[int, KeyValues]  # by layer
    outputs: dict[str, dict[int, Tensor]]  # by kind and layer, what modules of the clean run gave (length, d_model)
    answer: int  # token id
    probabilities: Tensor  # (versions,) of it


@torch.no_grad()
def trace_fact(
    adapter: ModelAdapter,
    fact: TokenizedFact,
    noise: Tensor,
    kinds: Sequence[Kind] = KINDS,
    window: int = 10,
    decode: Callable[[int], str] = str,
    most_tokens: int = MOST_TOKENS,
    most_together: int = MOST_TOGETHER,
    check: Callable[[], object] | None = None,
) -> FactTrace:
    """Trace one fact.

    Args:
        adapter: The model, or a view of it.
        fact: The fact.
        noise: ``(samples, subject tokens, width of the embeddings)``, added to the embeddings of the subject's tokens.
        kinds: What to restore.
        window: Layers restored together, of MLPs and attentions.
        decode: Turns the answer's token id into text.
        most_tokens: Run no more of one restoration together, unless one position already takes more.
        most_together: Run no more of several restorations together, unless one already takes more.
        check: Called every now and then; what it raises ends the tracing.

    Raises:
        ValueError: If the noise does not fit the subject, or there is nothing to restore.
    """
    first, behind = fact.subject
    length = len(fact.ids)
    if noise.dim() != 3 or noise.shape[0] < 1 or noise.shape[1] != behind - first:
        raise ValueError(f"noise must be (samples, {behind - first} subject tokens, width), got {tuple(noise.shape)}")
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    calls = PromptCalls(adapter, torch.tensor([fact.ids], device=adapter.device))
    with adapter.fast_products(), rounding_once(adapter):
        runs = _run_whole(adapter, calls, fact, noise)
        samples = len(noise)
        plan = _plan(kinds, window, adapter.n_layers, adapter.packs)
        found: dict[str, list[list[float]]] = {kind: [[] for _ in range(adapter.n_layers)] for kind in kinds}
        for positions in _portions(range(first, length), length, samples, most_tokens):
            starts = [position for position in positions for _ in range(samples)]
            bases = [1 + sample for _ in positions for sample in range(samples)]
            line = PromptLine(calls, starts, bases, samples + 1)
            for one, ends in _restore(line, runs, plan, most_together):
                if check is not None:
                    check()
                if (one.kind, one.layer) == ("hidden", adapter.n_layers - 1):
                    # Behind the last layer nothing follows: only the last token's own state changes what is said.
                    last = torch.tensor(starts, device=adapter.device) == length - 1
                    p = torch.where(last, runs.probabilities[0], runs.probabilities[1:].repeat(len(positions)))
                else:
                    p = torch.log_softmax(_logits(adapter, ends), -1)[:, runs.answer].exp()
                found[one.kind][one.layer] += p.view(len(positions), samples).mean(1).tolist()
    clean, corrupt = runs.probabilities[0], runs.probabilities[1:].mean()
    return FactTrace(
        id=fact.fact.id,
        prompt=fact.fact.prompt,
        tokens=fact.tokens,
        subject=fact.subject,
        answer=decode(runs.answer),
        p_clean=float(clean),
        p_corrupt=float(corrupt),
        restored={kind: tuple(tuple(row) for row in rows) for kind, rows in found.items()},
    )


def _portions(positions: range, length: int, samples: int, most_tokens: int) -> Iterator[list[int]]:
    """Cut positions into portions whose versions, from each position to the end, are not too many tokens."""
    portion: list[int] = []
    tokens = 0
    for position in positions:
        more = (length - position) * samples
        if portion and tokens + more > most_tokens:
            yield portion
            portion, tokens = [], 0
        portion.append(position)
        tokens += more
    yield portion


def _run_whole(adapter: ModelAdapter, calls: PromptCalls, fact: TokenizedFact, noise: Tensor) -> _Runs:
    """Make the clean run and the noisy ones, and keep what restorations need of them."""
    versions = 1 + len(noise)
    ids = torch.tensor([fact.ids] * versions, device=adapter.device)
    with noisy_embeddings(adapter, torch.cat([torch.zeros_like(noise[:1]), noise]), fact.subject[0]):
        hidden, _ = adapter.record_calls(ids, torch.ones_like(ids))
    line = PromptLine(calls, [0] * versions, [0] * versions, 0)
    states, kept = [hidden], dict[int, KeyValues]()
    outputs: dict[str, dict[int, Tensor]] = {"mlp": {}, "attn": {}}
    flat = hidden.flatten(0, 1)
    for layer in range(adapter.n_layers):
        with reading(adapter, layer, outputs, calls.length):
            flat = line.run_layer(layer, flat, keep=kept)
        states.append(flat.view_as(hidden))
    logits = _logits(adapter, flat[line.ends])
    answer = int(logits[0].argmax())
    return _Runs(states, kept, outputs, answer, torch.softmax(logits, -1)[:, answer])


@dataclass(frozen=True)
class _Restoration:
    """Something restored around one layer, at each of the positions of a line."""

    kind: Kind
    layer: int  # around which; the column of the result
    begin: int  # the first layer that is run for it
    window: tuple[int, int]  # layers start .. stop - 1 whose modules are restored; empty for hidden states
    trunk: tuple[Kind, int] | None = None  # whose states at "begin" it departs from, if not from the noisy ones

    @property
    def key(self) -> tuple[Kind, int]:
        """Kind and layer, which no other has."""
        return self.kind, self.layer


def _plan(kinds: Sequence[Kind], width: int, n_layers: int, skips: bool) -> list[_Restoration]:
    """Return all restorations, those that begin at lower layers first, and each behind its trunk.

    Windows that begin at the same layer (those cut off at the bottom) go the same way as far as the shortest reaches:
    the longest is the trunk, from which the others depart where they end. With ``skips`` a window's first layer need
    not be run (:func:`_first_state`).
    """
    plan = []
    for kind in kinds:
        if kind == "hidden":
            plan += [_Restoration(kind, layer, layer + 1, (0, 0)) for layer in range(n_layers)]
            continue
        windows = [(*window_around(layer, width, n_layers), layer) for layer in range(n_layers)]
        for start, group in groupby(windows, key=lambda window: window[0]):
            *shorter, (_, stop, longest) = group
            plan.append(_Restoration(kind, longest, start + skips, (start, stop)))
            plan += [_Restoration(kind, layer, end, (0, 0), (kind, longest)) for _, end, layer in shorter]
    return sorted(plan, key=lambda restoration: (restoration.begin, restoration.trunk is not None))


def _restore(
    line: PromptLine, runs: _Runs, plan: Sequence[_Restoration], most: int
) -> Iterator[tuple[_Restoration, Tensor]]:
    """Yield each restoration of a plan and what leaves the last layer at the versions' ends ``(versions, d_model)``.

    Restorations that are under way run as one line, layer by layer; those that begin later join it. ``line`` holds all
    positions and samples of one restoration; no more than ``most`` tokens are run together, unless one restoration
    already takes more.
    """
    adapter = line.adapter
    places, chosen = line.place(line.starts), torch.tensor(line.starts, device=adapter.device)
    lines: dict[int, PromptLine] = {1: line}
    departing: dict[tuple[Kind, int], Tensor] = {}  # states of trunks, for those that depart from them
    together = max(1, most // len(line))
    for batch in (plan[at : at + together] for at in range(0, len(plan), together)):
        active: list[_Restoration] = []
        hidden = runs.states[0].new_empty(0, runs.states[0].shape[-1])
        for layer in range(batch[0].begin, adapter.n_layers + 1):
            for other in plan:
                if other.begin == layer and other.trunk in (keys := [one.key for one in active]):
                    at = keys.index(other.trunk) * len(line)
                    departing[other.key] = hidden[at : at + len(line)].clone()
            joining = [one for one in batch if one.begin == layer]
            for one in joining:
                state = departing.pop(one.key) if one.trunk else _first_state(line, runs, one)
                for other in plan:
                    if other.trunk == one.key and other.begin == layer:
                        departing[other.key] = state
                hidden = torch.cat([hidden, state])
            active += joining
            if layer == adapter.n_layers:
                break
            if len(active) not in lines:
                lines[len(active)] = line.repeated(len(active))
            with ExitStack() as stack:
                ends = lines[len(active)].ends if layer == adapter.n_layers - 1 else None
                stack.enter_context(only_at(adapter, layer, ends))
                for kind in ("mlp", "attn"):
                    within = [i for i, one in enumerate(active) if one.kind == kind and layer in range(*one.window)]
                    if within:
                        where = torch.cat([places + i * len(line) for i in within])
                        clean = runs.outputs[kind][layer][chosen].repeat(len(within), 1)
                        stack.enter_context(restoring(adapter, kind, layer, where, clean, ends))
                hidden = lines[len(active)].run_layer(layer, hidden, runs.kept.get(layer))
        for one, states in zip(active, hidden.view(len(active), len(line), -1), strict=True):
            yield one, states[line.ends]


def _first_state(line: PromptLine, runs: _Runs, one: _Restoration) -> Tensor:
    """Return the states ``(tokens, d_model)`` that enter the first layer that is run for a restoration."""
    noisy = runs.states[one.begin].flatten(0, 1)[line.base]
    places, chosen = line.place(line.starts), torch.tensor(line.starts, device=line.adapter.device)
    if one.kind == "hidden":
        return noisy.index_copy(0, places, runs.states[one.begin][0, chosen])
    first = one.window[0]
    if one.begin == first:
        return noisy
    # Behind a window's first layer only the restored tokens differ from the noisy run: those behind see them from the
    # next layer on.
    alone = line.alone()
    every = torch.arange(len(alone), device=line.adapter.device)
    with restoring(line.adapter, one.kind, first, every, runs.outputs[one.kind][first][chosen]):
        left = alone.run_layer(first, runs.states[first].flatten(0, 1)[alone.base], runs.kept[first])
    return noisy.index_copy(0, places, left)


def _logits(adapter: ModelAdapter, hidden: Tensor) -> Tensor:
    return adapter.logits(adapter.finish(hidden))
