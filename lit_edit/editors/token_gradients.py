"""What the down projections get and what the loss wants of them, at the tokens that predict an edit's target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_edit.devices.algebra import for_algebra
from lit_edit.models.adapter import ModelAdapter
from lit_edit.text.tokens import pad_right

BATCH_TOKENS = 2048
"""Tokens run forward and backward at a time, padding included: they bound the memory."""

Row = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a prompt, and of the target as it follows it."""


@dataclass(frozen=True)
class TokenGradients:
    """Inputs and gradients, a row per target token (or per token that is read): edit by edit, in the order of the text.

    Attributes:
        inputs: By layer, ``(tokens, d_in)``, of the down projection.
        gradients: By layer, ``(tokens, d_out)``, of the loss with respect to the projection's output.
        owner: ``(tokens,)``, the edit of each.
        losses: ``(edits,)``, the mean cross entropy over the target's tokens.
    """

    inputs: Mapping[int, Tensor]
    gradients: Mapping[int, Tensor]
    owner: Tensor
    losses: Tensor


def collect_gradients(
    adapter: ModelAdapter,
    rows: Sequence[Row],
    layers: Sequence[int],
    pad: int,
    batch_tokens: int = BATCH_TOKENS,
    everywhere: bool = False,
) -> TokenGradients:
    """Run edits forward and backward, each with the mean cross entropy of its target's tokens (teacher forcing).

    Each edit is a loss of its own: what is found, in float64, does not depend, but for round-off, on what else is in
    the batch. The released code takes the mean over all target tokens of a batch.

    Args:
        adapter: The model, or a view of it.
        rows: One per edit.
        layers: Which down projections.
        pad: Any token id.
        batch_tokens: Tokens at a time, at most, or one row.
        everywhere: Return all tokens that are read, not only those that predict the target's: the gradient of a weight
            is the sum over all of them.
    """
    counts = [len(target) + everywhere * (len(prompt) - 1) for prompt, target in rows]
    owner = torch.tensor([edit for edit, count in enumerate(counts) for _ in range(count)], dtype=torch.long)
    places = torch.arange(len(owner)).split(counts)
    inputs: dict[int, Tensor] = {}
    gradients: dict[int, Tensor] = {}
    losses: Tensor | None = None
    for batch in _batches([len(prompt) + len(target) - 1 for prompt, target in rows], batch_tokens):
        found = _run(adapter, [rows[edit] for edit in batch], layers, pad, everywhere)
        at = torch.cat([places[edit] for edit in batch])
        if losses is None:
            losses = for_algebra(found.losses).new_zeros(len(rows))
        losses[batch] = for_algebra(found.losses)
        for into, part in ((inputs, found.inputs), (gradients, found.gradients)):
            for layer, value in part.items():
                exact = for_algebra(value)
                into.setdefault(layer, exact.new_empty(len(owner), exact.shape[1]))[at] = exact
    assert losses is not None, "rows must hold at least one edit"  # noqa: S101 - a step has one
    same = adapter.ranks.same  # every rank has run everything; another processor may have rounded otherwise
    return TokenGradients(
        {layer: same(value) for layer, value in inputs.items()},
        {layer: same(value) for layer, value in gradients.items()},
        owner,
        same(losses),
    )


def _run(
    adapter: ModelAdapter, rows: Sequence[Row], layers: Sequence[int], pad: int, everywhere: bool
) -> TokenGradients:
    """Run some rows together."""
    ids, mask = pad_right([prompt + target[:-1] for prompt, target in rows], pad, adapter.device)
    owner = torch.tensor([edit for edit, (_, target) in enumerate(rows) for _ in target], device=adapter.device)
    predicting = [len(prompt) - 1 + i for prompt, target in rows for i in range(len(target))]
    at = owner, torch.tensor(predicting, device=adapter.device)
    wanted = torch.tensor([token for _, target in rows for token in target], device=adapter.device)
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    with torch.enable_grad(), adapter.fast_products(), ExitStack() as stack:
        for layer in layers:
            hook = _Reader(layer, inputs, outputs)
            stack.callback(adapter.down_proj(layer).register_forward_hook(hook).remove)
        hidden = adapter.last_hidden(ids, mask)
        nll = nn.functional.cross_entropy(adapter.logits(hidden[at]), wanted, reduction="none")
        count = torch.bincount(owner, minlength=len(rows))
        losses = nll.new_zeros(len(rows)).index_add(0, owner, nll) / count
        slopes = torch.autograd.grad(losses.sum(), [outputs[layer] for layer in layers])
    if everywhere:
        row, position = mask.nonzero(as_tuple=True)
        at = row, position
    shape = (*ids.shape, -1)
    return TokenGradients(
        {layer: inputs[layer].reshape(shape)[at] for layer in layers},
        {layer: slope.reshape(shape)[at] for layer, slope in zip(layers, slopes, strict=True)},
        at[0],
        losses.detach(),
    )


class _Reader:
    """A hook that notes what a module is given and what it returns, and has gradients begin there at the latest."""

    def __init__(self, layer: int, inputs: dict[int, Tensor], outputs: dict[int, Tensor]) -> None:
        self._layer, self._inputs, self._outputs = layer, inputs, outputs

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        self._inputs[self._layer] = args[0].detach()
        # The weights are frozen: below the first edited layer there is nothing to differentiate.
        output = output if output.requires_grad else output.detach().requires_grad_()
        self._outputs[self._layer] = output
        return output


def _batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Cut rows (by index) into batches of similar length, of at most so many tokens with their padding, or one row."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):  # ascending: the last one is the longest
        if not batches or (len(batches[-1]) + 1) * lengths[index] > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches
