"""Records to train an editor's network on, kept apart from those of the stream that is to be edited."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lit_edit.data.request import DataError, EditRequest
from lit_edit.data.sources import OnError, Source, load_requests
from lit_edit.errors import check_least


class RecordBatch:
    """Records of one step. No collection or dataclass: Lightning would take it apart to move what is in it."""

    __slots__ = ("requests",)

    def __init__(self, requests: Sequence[EditRequest]) -> None:
        self.requests = tuple(requests)

    def __len__(self) -> int:
        return len(self.requests)


class RecordsDataModule(LightningDataModule):
    """Records for training and validation, from any file that a stream can be read from.

    Args:
        path: File (JSON list, JSONL or CSV) or hub data set id.
        source: As ``data.source`` of a stream: ``file``, the name of a format, ``hub`` or ``builtin``.
        skip: Leave out this many records at the beginning: those that are to be edited later. What a network was
            trained on says nothing about how it edits.
        limit: Take at most this many behind them.
        validation: Hold out so many of those, the last ones.
        batch_size: Records per step.
        seed: Shuffles the training records, anew in each epoch.
        on_error: What to do about a broken record: ``raise`` or ``skip``.
        split: Split of a hub data set.
    """

    def __init__(
        self,
        path: str | None = None,
        source: Source = "file",
        skip: int = 1000,
        limit: int | None = None,
        validation: int = 20,
        batch_size: int = 1,
        seed: int = 0,
        on_error: OnError = "raise",
        split: str = "train",
    ) -> None:
        super().__init__()
        check_least(0, skip=skip, validation=validation)
        check_least(1, batch_size=batch_size)
        if limit is not None and limit <= validation:
            raise ValueError(f"limit must be larger than validation ({validation}): nothing is left to train on")
        self.path, self.source, self.skip, self.limit = path, source, skip, limit
        self.validation, self.batch_size, self.seed = validation, batch_size, seed
        self.on_error, self.split = on_error, split
        self.training: list[EditRequest] = []
        self.held_out: list[EditRequest] = []

    @classmethod
    def from_requests(cls, requests: Sequence[EditRequest], **options: Any) -> RecordsDataModule:
        """Make a data module of requests that are at hand; ``skip`` (0 here) and ``limit`` apply to them."""
        module = cls(**{"skip": 0, **options})
        end = None if module.limit is None else module.skip + module.limit
        module._part(list(requests)[module.skip : end])
        return module

    def setup(self, stage: str) -> None:
        """Read the records, once; :class:`DataError` if they cannot be read or are too few."""
        if not self.training:
            self._part(load_requests(self.source, self.path, self.limit, self.skip, self.on_error, self.split)[0])

    def _part(self, requests: list[EditRequest]) -> None:
        kept = len(requests) - self.validation
        if kept < 1:
            raise DataError(
                f"{self.path or 'the data'}: {len(requests)} records behind skip={self.skip}, of which "
                f"{self.validation} are held out (validation): none is left to train on"
            )
        self.training, self.held_out = requests[:kept], requests[kept:]

    def train_dataloader(self) -> DataLoader[EditRequest]:
        """Return the training records, shuffled."""
        shuffled = torch.Generator().manual_seed(self.seed)
        return self._loader(self.training, shuffle=True, generator=shuffled)

    def val_dataloader(self) -> DataLoader[EditRequest] | list[Any]:
        """Return the records that are held out, in order."""
        return self._loader(self.held_out) if self.held_out else []

    def _loader(self, requests: list[EditRequest], **options: Any) -> DataLoader[EditRequest]:
        return DataLoader(requests, batch_size=self.batch_size, collate_fn=RecordBatch, **options)  # type: ignore[arg-type]
