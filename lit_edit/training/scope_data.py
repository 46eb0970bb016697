"""Pairs of an edit and a prompt that is about it or not, for the networks of SERAC."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lit_edit.data.request import DataError, EditRequest
from lit_edit.data.sources import OnError, Source, load_requests
from lit_edit.errors import check_least


class ScopePair(NamedTuple):
    """An edit, and a prompt that somebody asks."""

    edit: str  # its prompt, filled
    target: str  # its new object
    asked: str  # the prompt
    inside: bool  # whether the edit is to change the answer


def pairs_of(requests: Sequence[EditRequest], others: int, seed: int) -> list[ScopePair]:
    """Return the pairs that some edits make.

    Inside an edit's scope are its prompt and paraphrases; outside are its neighbours and the prompts and paraphrases of
    other edits, with another subject.

    Args:
        requests: The edits.
        others: Prompts of other edits per edit.
        seed: Chooses them.

    Example:
        >>> from lit_edit.testing import tiny_requests
        >>> [pair.inside for pair in pairs_of(tiny_requests()[:2], 1, 0)]
        [True, True, False, False, True, True, False, False]
    """
    draw = random.Random(seed)
    pairs = []
    for request in requests:
        asked = [(text, True) for text in (request.text, *request.paraphrases)]
        asked += [(probe.prompt, False) for probe in request.neighborhood]
        far = [other for other in requests if other.subject.lower() != request.subject.lower()]
        for other in draw.sample(far, min(others, len(far))):
            asked.append((draw.choice((other.text, *other.paraphrases)), False))
        pairs += [ScopePair(request.text, request.target_new, text, inside) for text, inside in asked]
    return pairs


class ScopeData(LightningDataModule):
    """Pairs of edits and prompts, made of records with paraphrases and neighbours.

    Train on records that no evaluation stream has: ``offset`` leaves out the beginning of the file, from which streams
    take their edits.

    Args:
        source: As for the edits of a stream: ``builtin``, ``file``, a format, or ``hub``.
        path: File or hub data set id.
        offset: Leave out this many records at the beginning.
        limit: Take at most this many.
        held_out: Share of them that validates; their edits are seen in no other way.
        others: Prompts of other edits per edit.
        batch_size: Pairs of a step.
        seed: Chooses the prompts of other edits.
        on_error: What to do about a broken record: ``raise`` or ``skip``.
        split: Split of a hub data set.
    """

    def __init__(
        self,
        source: Source = "file",
        path: str | None = None,
        offset: int = 1000,
        limit: int | None = 400,
        held_out: float = 0.1,
        others: int = 2,
        batch_size: int = 64,
        seed: int = 0,
        on_error: OnError = "raise",
        split: str = "train",
    ) -> None:
        super().__init__()
        check_least(0, **{"data.offset": offset, "data.others": others})
        check_least(1, **{"data.batch_size": batch_size})
        check_least(2, **{"data.limit": limit})
        if not 0 < held_out < 1:
            raise ValueError(f"data.held_out is a share between 0 and 1, got {held_out}")
        self.source, self.path, self.offset, self.limit = source, path, offset, limit
        self.held_out, self.others, self.batch_size, self.seed = held_out, others, batch_size, seed
        self.on_error, self.split = on_error, split
        self.requests: list[EditRequest] = []
        self.held: list[EditRequest] = []

    def setup(self, stage: str) -> None:
        """Read the records, once; :class:`DataError` if one is broken or too few are left."""
        if self.requests:
            return
        found, _ = load_requests(self.source, self.path, self.limit, self.offset, self.on_error, self.split)
        if not any(request.paraphrases for request in found):
            raise DataError(
                f"{self.path or self.source}: these records have no paraphrases, of which a scope is learnt"
            )
        held = max(1, round(self.held_out * len(found)))
        known = {request.subject.lower() for request in found[-held:]}
        self.held = found[-held:]
        self.requests = [request for request in found[:-held] if request.subject.lower() not in known]
        if not self.requests:
            raise DataError(f"{self.path or self.source}: nothing is left to train on beside {held} held-out records")

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the pairs to learn from, in another order every epoch."""
        return self._loader(self.requests, True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the pairs of the held-out edits."""
        return self._loader(self.held, False)

    def _loader(self, requests: Sequence[EditRequest], shuffle: bool) -> DataLoader[Any]:
        pairs: Any = pairs_of(requests, self.others, self.seed)
        return DataLoader(pairs, self.batch_size, shuffle=shuffle, collate_fn=list)
