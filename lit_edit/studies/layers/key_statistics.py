"""Key statistics of all layers in one pass: a candidate's own would have the text written and read anew each time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_edit.models.adapter import ModelAdapter
from lit_edit.stats.corpus import Corpus
from lit_edit.stats.second_moment import KeyStatistics, Progress

_AT_ONCE = 8 << 30  # bytes of sums in one pass; more layers than fit are counted in several


@dataclass(frozen=True)
class StatisticsOfAll(KeyStatistics):
    """Key statistics that count all layers as soon as one is asked for, and keep them in the cache."""

    every: tuple[int, ...] = ()  # that will be asked for; nothing is counted for an editor that asks for none
    _places: dict[int, tuple[Corpus, int, Path]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def like(cls, statistics: KeyStatistics, every: Sequence[int]) -> StatisticsOfAll:
        """Return the same statistics, for these layers."""
        return cls(**{**asdict(statistics), "force": False}, every=tuple(every))

    def compute(
        self,
        adapter: ModelAdapter,
        tokenizer: PreTrainedTokenizerBase,
        layers: Sequence[int],
        progress: Progress | None = None,
    ) -> dict[int, Tensor]:
        """Return the second moments of some layers; see :meth:`KeyStatistics.compute`."""
        every = sorted({*self.every, *layers})
        if not self.is_cached(adapter, layers):
            most = max(1, _AT_ONCE // (8 * max(adapter.shape(layer)[1] for layer in every) ** 2))
            for first in range(0, len(every), most):
                super().compute(adapter, tokenizer, every[first : first + most], progress)
        return super().compute(adapter, tokenizer, layers, progress)

    def _place(self, adapter: ModelAdapter, layers: Sequence[int]) -> tuple[Corpus, int, Path]:
        width = max(adapter.shape(layer)[1] for layer in layers)
        if width not in self._places:  # hashing the weights of a large model takes long, and they are the same
            self._places[width] = super()._place(adapter, layers)
        return self._places[width]
