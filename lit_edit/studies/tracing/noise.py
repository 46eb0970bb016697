"""The corruption: Gaussian noise on the embeddings of the subject's tokens."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lit_edit.models.adapter import ModelAdapter
from lit_edit.studies.tracing.prompts import TokenizedFact


@torch.no_grad()
def embedding_deviation(adapter: ModelAdapter, facts: Iterable[TokenizedFact]) -> tuple[float, int]:
    """Return the standard deviation of all numbers in the embeddings of the subjects' tokens, and an embedding's width.

    Noise of three of these is what the field calls ``s3``.
    """
    ids = [token for fact in facts for token in fact.ids[slice(*fact.subject)]]
    embedded = adapter.model.get_input_embeddings()(torch.tensor([ids], device=adapter.device))
    return float(embedded.double().std(correction=0)), embedded.shape[-1]


def draw_noise(fact: TokenizedFact, samples: int, width: int, scale: float, seed: int) -> np.ndarray:
    """Return noise ``(samples, subject tokens, width)`` for a fact, float64.

    It depends on the seed and on the fact's own text, not on the facts traced before, the device or the library.
    ``scale`` is its standard deviation.
    """
    text = f"{fact.fact.prompt}\n{fact.fact.start}\n{fact.fact.subject}"
    generator = np.random.default_rng([seed, zlib.crc32(text.encode())])
    first, behind = fact.subject
    return scale * generator.standard_normal((samples, behind - first, width))


@contextmanager
def noisy_embeddings(adapter: ModelAdapter, noise: Tensor, first: int) -> Iterator[None]:
    """Add noise ``(rows, tokens, width)`` to what the embedding layer says, from the token ``first`` on."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        before, behind = first, output.shape[1] - first - noise.shape[1]
        return output + nn.functional.pad(noise.to(output), (0, 0, before, behind))

    with adapter.model.get_input_embeddings().register_forward_hook(hook):
        yield
