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
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lit_edit.models.adapter import ModelAdapter
from lit_edit.tracing.line import KeyValues, PromptCalls, PromptLine
from lit_edit.tracing.noise import noisy_embeddings
from lit_edit.tracing.prompts import TokenizedFact

Kind = Literal["hidden", "mlp", "attn"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""What is restored: one hidden state, or MLP or attention outputs over a window of layers."""

MOST_TOKENS = 16_384
"""Tokens run together; longer prompts are traced a few positions at a time."""


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

    def as_dict(self) -> dict[str, Any]:
        """Return primitives for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FactTrace:
        """Restore :meth:`as_dict`, also after a way through JSON.

        Raises:
            KeyError: If a field is missing.
            TypeError: If one is of the wrong kind.
        """
        layers = {str(kind): tuple(tuple(map(float, row)) for row in rows) for kind, rows in values["restored"].items()}
        first, behind = values["subject"]
        return cls(
            id=values["id"],
            prompt=values["prompt"],
            tokens=tuple(values["tokens"]),
            subject=(int(first), int(behind)),
            answer=values["answer"],
            p_clean=float(values["p_clean"]),
            p_corrupt=float(values["p_corrupt"]),
            restored=layers,
        )


def window_around(layer: int, width: int, n_layers: int) -> tuple[int, int]:
    """Return the window of layers ``start .. stop - 1`` around a layer, cut off at the model's ends.

    Example:
        >>> window_around(10, 10, 30), window_around(2, 10, 30), window_around(7, 1, 30), window_around(7, 3, 30)
        ((5, 15), (0, 7), (7, 8), (6, 9))
    """
    return max(0, layer - width // 2), min(n_layers, layer - width // 2 + width)


@dataclass(frozen=True)
class _Runs:
    """The clean run (version 0) and the noisy ones.

    Attributes:
        states: By layer, its input ``(versions, length, d_model)``; behind the last layer its output.
        kept: By layer, attention keys and values.
        outputs: By kind and layer, what modules of the clean run gave ``(length, d_model)``.
        answer: Token id.
        probabilities: ``(versions,)`` of it.
    """

    states: list[Tensor]
    kept: dict[int, KeyValues]
    outputs: dict[str, dict[int, Tensor]]
    answer: int
    probabilities: Tensor


@torch.no_grad()
def trace_fact(
    adapter: ModelAdapter,
    fact: TokenizedFact,
    noise: Tensor,
    kinds: Sequence[Kind] = KINDS,
    window: int = 10,
    decode: Callable[[int], str] = str,
    most_tokens: int = MOST_TOKENS,
) -> FactTrace:
    """Trace one fact.

    Args:
        adapter: The model, or a view of it.
        fact: The fact.
        noise: ``(samples, subject tokens, width of the embeddings)``, added to the embeddings of the subject's tokens.
        kinds: What to restore.
        window: Layers restored together, of MLPs and attentions.
        decode: Turns the answer's token id into text.
        most_tokens: Run no more together, unless one position already takes more.

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
    with adapter.fast_products():
        runs = _run_whole(adapter, calls, fact, noise)
        samples = len(noise)
        found: dict[str, list[list[float]]] = {kind: [[] for _ in range(adapter.n_layers)] for kind in kinds}
        for positions in _portions(range(first, length), length, samples, most_tokens):
            starts = [position for position in positions for _ in range(samples)]
            bases = [1 + sample for _ in positions for sample in range(samples)]
            line = PromptLine(calls, starts, bases, samples + 1)
            for kind in kinds:
                restoring = _restore_states(adapter, line, starts, runs) if kind == "hidden" else (
                    _restore_windows(adapter, line, starts, runs, kind, window)
                )  # fmt: skip
                for layer, hidden in restoring:
                    p = _probability(adapter, hidden[line.ends], runs.answer)
                    found[kind][layer] += p.view(len(positions), samples).mean(1).tolist()
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
        with _reading(adapter, layer, outputs, calls.length):
            flat = line.run_layer(layer, flat, keep=kept)
        states.append(flat.view_as(hidden))
    logits = _logits(adapter, flat[line.ends])
    answer = int(logits[0].argmax())
    return _Runs(states, kept, outputs, answer, torch.softmax(logits, -1)[:, answer])


def _restore_states(
    adapter: ModelAdapter, line: PromptLine, starts: Sequence[int], runs: _Runs
) -> Iterator[tuple[int, Tensor]]:
    """Yield, per layer, what leaves the last one when the hidden state behind that layer is restored."""
    places, chosen = line.place(starts), torch.tensor(starts, device=adapter.device)
    for layer in range(adapter.n_layers):
        after = runs.states[layer + 1]
        hidden = after.flatten(0, 1)[line.base].index_copy(0, places, after[0, chosen])
        yield layer, _run(line, hidden, layer + 1, adapter.n_layers, runs)


def _restore_windows(
    adapter: ModelAdapter, line: PromptLine, starts: Sequence[int], runs: _Runs, kind: str, width: int
) -> Iterator[tuple[int, Tensor]]:
    """Yield, per layer, what leaves the last one when modules of the window around that layer are restored.

    Windows that begin at the same layer (those cut off at the bottom) share their way as far as they go together.
    """
    places, chosen = line.place(starts), torch.tensor(starts, device=adapter.device)
    windows = [(*window_around(layer, width, adapter.n_layers), layer) for layer in range(adapter.n_layers)]
    for start, group in groupby(windows, key=lambda w: w[0]):
        hidden, at = runs.states[start].flatten(0, 1)[line.base], start
        for _, stop, layer in group:
            for index in range(at, stop):
                clean = runs.outputs[kind][index][chosen]
                with _restoring(_module(adapter, kind, index), places, clean):
                    hidden = _run(line, hidden, index, index + 1, runs)
            at = stop
            yield layer, _run(line, hidden, stop, adapter.n_layers, runs)


def _run(line: PromptLine, hidden: Tensor, start: int, stop: int, runs: _Runs) -> Tensor:
    for layer in range(start, stop):
        hidden = line.run_layer(layer, hidden, runs.kept.get(layer))
    return hidden


def _module(adapter: ModelAdapter, kind: str, layer: int) -> nn.Module:
    """Return the module whose output is restored; an MLP's output is that of its down projection."""
    return adapter.down_proj(layer) if kind == "mlp" else adapter.attention_module(layer)


@contextmanager
def _reading(
    adapter: ModelAdapter, layer: int, outputs: Mapping[str, dict[int, Tensor]], length: int
) -> Iterator[None]:
    """Note what the modules of a layer give in the first version of a line."""

    def hook_for(kind: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            outputs[kind][layer] = first.reshape(-1, first.shape[-1])[:length]

        return hook

    handles = [_module(adapter, kind, layer).register_forward_hook(hook_for(kind)) for kind in outputs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _restoring(module: nn.Module, places: Tensor, clean: Tensor) -> Iterator[None]:
    """Let a module give clean outputs ``(places, d_model)`` at some places of the line."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        mended = first.reshape(-1, first.shape[-1]).index_copy(0, places, clean.to(first)).view_as(first)
        return (mended, *output[1:]) if isinstance(output, tuple) else mended

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _logits(adapter: ModelAdapter, hidden: Tensor) -> Tensor:
    return adapter.logits(adapter.finish(hidden))


def _probability(adapter: ModelAdapter, hidden: Tensor, answer: int) -> Tensor:
    """Return the probability of a token ``(versions,)`` after final states ``(versions, d_model)``."""
    logits = _logits(adapter, hidden)
    return torch.log_softmax(logits, -1)[:, answer].exp()
