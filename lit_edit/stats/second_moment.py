r"""Second moments of the keys, :math:`C = E[k k^\top]`: what a layer's inputs look like on ordinary text.

One pass collects all edited layers and stops at the highest of them. About ten vectors per dimension are enough for a
well-conditioned estimate (arXiv 2506.04226); that is minutes where a hundred thousand articles are days.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lit_edit.data.request import DataError
from lit_edit.devices.algebra import algebra_dtype, for_algebra, without_autocast
from lit_edit.files.paths import cache_dir, expand, write_atomically
from lit_edit.files.tensor_files import check_digests, save_tensors, with_digests
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.shards import whole
from lit_edit.stats.corpus import Corpus, open_corpus
from lit_edit.text.buckets import partition_by_length
from lit_edit.text.tokens import pad_right, pad_token

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

SAVE_EVERY = 60.0
"""Seconds between records of a count under way: the sums of all layers are large, and a chunk is soon counted again."""


@dataclass(frozen=True)
class KeyStatistics:
    """Which key statistics to use, and where they are kept.

    Args:
        corpus: ``"sampled"`` (the model writes the text itself), a text file, or the id of a hub data set.
        tokens: Tokens to read; never fewer than ten per dimension of the keys.
        seed: For sampled text.
        skip_first: Leave out the first token of every text, whose key is an outlier in most models.
        cache: Folder to keep results in; by default in lit-edit's cache.
        force: Compute anew even if a result is kept.
    """

    corpus: str = "sampled"
    tokens: int = 0
    seed: int = 0
    skip_first: bool = False
    cache: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise ValueError(f"model.statistics.tokens must not be negative, got {self.tokens}")

    def compute(
        self,
        adapter: ModelAdapter,
        tokenizer: PreTrainedTokenizerBase,
        layers: Sequence[int],
        progress: Progress | None = None,
    ) -> dict[int, Tensor]:
        """Return ``{layer: (d_in, d_in)}`` in float64 in host memory, from the cache where possible.

        The adapter is the unedited model; ``progress`` is called with ``(tokens read, tokens in all)``. Of several
        ranks the leader alone returns them; the others help to count and return nothing.

        Raises:
            DataError: If the corpus has fewer tokens than asked for.
        """
        corpus, budget, folder = self._place(adapter, layers)
        found: dict[int, Tensor] = {}
        for layer in layers if adapter.ranks.leads and not self.force else ():
            moment = _load_moment(folder / f"layer{layer}.safetensors", adapter.shape(layer)[1])
            if moment is not None:
                found[layer] = moment
        missing = adapter.ranks.agree([layer for layer in layers if layer not in found])
        if missing:
            with without_autocast(adapter.device):  # what is kept is for runs of any precision
                found |= accumulate(adapter, tokenizer, missing, corpus, budget, self.skip_first, folder, progress)
        return found

    def is_cached(self, adapter: ModelAdapter, layers: Sequence[int]) -> bool:
        """Tell whether :meth:`compute` would find everything in the cache."""
        folder = self._place(adapter, layers)[2]
        return not self.force and all((folder / f"layer{layer}.safetensors").is_file() for layer in layers)

    def _place(self, adapter: ModelAdapter, layers: Sequence[int]) -> tuple[Corpus, int, Path]:
        """Return the text, how many tokens of it are read, and where the results are kept."""
        corpus = open_corpus(self.corpus, self.seed)
        budget = max(self.tokens, *(10 * adapter.shape(layer)[1] for layer in layers))
        base = expand(self.cache) if self.cache else cache_dir() / "stats"
        name = f"{corpus.fingerprint()}-{budget}" + ("-skipfirst" if self.skip_first else "")
        return corpus, budget, base / weights_hash(adapter.model, adapter.weights) / name


DEFAULT_STATISTICS = KeyStatistics(tokens=20_000)
"""What the shipped configs ask for, so that a session in Python and a run of the command line count them once."""


@torch.no_grad()
def accumulate(
    adapter: ModelAdapter,
    tokenizer: PreTrainedTokenizerBase,
    layers: Sequence[int],
    corpus: Corpus,
    budget: int,
    skip_first: bool,
    folder: Path,
    progress: Progress | None = None,
    save_every: float = SAVE_EVERY,
) -> dict[int, Tensor]:
    """Read ``budget`` tokens and return the mean of ``k k^T`` per layer, float64; nothing on ranks that do not lead.

    Partial sums are written to ``folder`` after the first chunk that ends ``save_every`` seconds behind the last such
    record, so an interrupted count goes on from there. Several ranks read a chunk each at a time, the very chunks that
    one process would read; in lockstep all read the same one.
    """
    partial = folder / f"partial-{'-'.join(map(str, layers))}.safetensors"
    ranks = adapter.ranks
    dtype = algebra_dtype(torch.device("cpu"))
    counting = layers if ranks.leads or not ranks.lockstep else ()  # in lockstep the others run for company
    sums = {layer: torch.zeros(*[adapter.shape(layer)[1]] * 2, dtype=dtype) for layer in counting}
    count, index = _load_partial(partial, sums) if ranks.leads else (0, 0)
    count, index = ranks.agree([count, index])
    at_once, mine = (1, 0) if ranks.lockstep else (ranks.size, ranks.rank)
    pad, saved = pad_token(tokenizer), monotonic()
    while count < budget:
        if progress is not None:
            progress(count, budget)
        rows = corpus.chunk(index + mine, adapter, tokenizer)
        rows = [row for row in rows if len(row) > int(skip_first)]
        sizes = [sum(len(row) - int(skip_first) for row in rows)]
        if at_once > 1:
            sizes = [size for (size,) in ranks.gather(sizes)]
        taken = 0  # as one process would: until there are enough
        while taken < at_once and sizes[taken] and count < budget:
            count += sizes[taken]
            taken += 1
        if count < budget and taken < at_once:
            raise DataError(
                f"the corpus has {count} tokens; key statistics need {budget} (ten per key dimension at least). "
                "Use more text, or model.statistics.corpus=sampled"
            )
        if mine < taken:
            _add_rows(adapter, rows, layers, skip_first, pad, sums)
        for total in sums.values() if at_once > 1 else ():
            ranks.sum_at_leader_(total)
        index += taken
        if ranks.leads and count < budget and monotonic() - saved >= save_every:
            _save(partial, {str(layer): total for layer, total in sums.items()}, count=count, chunk=index)
            saved = monotonic()
    if progress is not None:
        progress(budget, budget)
    if not ranks.leads:
        return {}
    moments = {layer: (total.triu() + total.triu(1).T) / count for layer, total in sums.items()}
    for layer, moment in moments.items():
        _save(folder / f"layer{layer}.safetensors", {"moment": moment.contiguous()}, tokens=count)
    partial.unlink(missing_ok=True)
    return moments


def _add_rows(
    adapter: ModelAdapter,
    rows: Sequence[Sequence[int]],
    layers: Sequence[int],
    skip_first: bool,
    pad: int,
    sums: Mapping[int, Tensor],
) -> None:
    for members in partition_by_length([len(row) for row in rows], overhead=64):
        ids, mask = pad_right([rows[m] for m in members], pad, adapter.device)
        counted = mask.bool()
        if skip_first:
            counted[:, 0] = False
        with adapter.fast_products():
            keys_of = adapter.read_keys(ids, mask, layers)
        for layer, total in sums.items():
            add_gram(total, for_algebra(keys_of[layer][counted]).cpu())


def add_gram(total: Tensor, vectors: Tensor, block: int = 256) -> None:
    """Add ``vectors^T vectors`` of ``(n, d_in)`` to the upper triangle of ``total``; what is below has no meaning.

    By blocks of columns, so that little more than half of a full product is computed (a symmetric rank-k update, which
    PyTorch does not offer).

    Example:
        >>> total = torch.zeros(3, 3)
        >>> add_gram(total, torch.tensor([[1.0, 2.0, 3.0]]), block=2)
        >>> total.triu()
        tensor([[1., 2., 3.],
                [0., 4., 6.],
                [0., 0., 9.]])
    """
    for first in range(0, len(total), block):
        columns = slice(first, first + block)
        total[columns, first:].addmm_(vectors[:, columns].T, vectors[:, first:])


def weights_hash(model: nn.Module, weights: Mapping[str, Tensor] | None = None) -> str:
    """Return a hash of all parameters: statistics of one model are never taken for another's.

    Those of an adapter's view, by full name, take the place of the model's own.
    """
    weights = weights or {}
    digest = hashlib.blake2b(digest_size=12)
    for name, parameter in sorted(model.named_parameters()):
        value: Tensor = whole(weights.get(name, parameter))
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        raw: Any = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        digest.update(raw)
    return digest.hexdigest()


def _load_moment(path: Path, d_in: int) -> Tensor | None:
    """Return a kept result, or ``None`` if there is none or it is damaged (it is then computed anew)."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            moment = file.get_tensor("moment")
            check_digests(file.metadata() or {}, {"moment": moment})
    except (SafetensorError, OSError, ValueError) as error:
        log.warning("kept key statistics are damaged and will be computed anew: %s (%s)", path, error)
        return None
    if moment.shape != (d_in, d_in) or not torch.isfinite(moment).all():
        log.warning("kept key statistics do not fit and will be computed anew: %s", path)
        return None
    return moment


def _save(path: Path, tensors: Mapping[str, Tensor], **numbers: int) -> None:
    meta = {name: str(number) for name, number in numbers.items()}
    write_atomically(path, lambda target: save_tensors(tensors, target, with_digests(meta, tensors)))


def _load_partial(path: Path, sums: dict[int, Tensor]) -> tuple[int, int]:
    """Fill ``sums`` from an interrupted count; return its tokens and its next chunk."""
    if not path.is_file():
        return 0, 0
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata()
            loaded = {layer: file.get_tensor(str(layer)) for layer in sums}
            check_digests(meta, {str(layer): total for layer, total in loaded.items()})
            count, index = int(meta["count"]), int(meta["chunk"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        log.warning("an interrupted count of key statistics is damaged; it starts again: %s", path)
        return 0, 0
    for layer, total in loaded.items():
        sums[layer].copy_(total)
    return count, index
