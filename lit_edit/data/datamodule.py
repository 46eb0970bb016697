"""The stream as Lightning sees it: batches of edits in a fixed order, with a cursor that survives a restart."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from lit_edit.data.files import repeated
from lit_edit.data.request import DataError, EditRequest
from lit_edit.data.sources import OnError, Source, builtin_text, load_requests
from lit_edit.data.texts import read_documents
from lit_edit.errors import check_least
from lit_edit.files.paths import expand


class EditBatch:
    """The edits of one step. Not a dataclass: Lightning would take it apart to convert the numbers in it.

    ``requests`` are committed together; ``window`` are the edits whose targets may be prepared together, these too.
    Windows lie at fixed places of the stream, so a resumed run sees the same ones.
    """

    __slots__ = ("requests", "window")

    def __init__(self, requests: tuple[EditRequest, ...], window: tuple[EditRequest, ...]) -> None:
        self.requests, self.window = requests, window


class StreamLoader:
    """Iterates over a stream from its cursor on; the length stays that of the whole stream.

    Lightning stores :meth:`state_dict` in checkpoints and restores it before iterating, so a resumed run goes on with
    the first edit that was not committed.
    """

    def __init__(self, requests: Sequence[EditRequest], batch_size: int = 1, window: int = 1) -> None:
        self.requests, self.batch_size, self.window = tuple(requests), batch_size, max(window, batch_size)
        self.cursor = 0
        self._resume_at = 0

    def __len__(self) -> int:
        return -(-len(self.requests) // self.batch_size)

    def __iter__(self) -> Iterator[EditBatch]:
        start, self._resume_at = self._resume_at, 0
        window = self.window - self.window % self.batch_size
        for index in range(start, len(self)):
            first = index * self.batch_size
            base = first - first % window
            self.cursor = index + 1
            yield EditBatch(self.requests[first : first + self.batch_size], self.requests[base : base + window])

    def state_dict(self) -> dict[str, int]:
        """Return the cursor: steps handed out so far."""
        return {"cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved cursor at the next iteration."""
        self.seek(int(state["cursor"]))

    def seek(self, steps: int) -> None:
        """Go on behind so many steps at the next iteration."""
        self.cursor = self._resume_at = steps


class EditDataModule(LightningDataModule):
    """The edits to make, in order.

    Args:
        source: Where the edits come from: ``builtin`` (facts written for this project), ``file`` (the format is seen
            from the fields), a format by name (``counterfact``, ``counterfact_flat``, ``zsre``, ``facts``), or ``hub``.
        path: File (JSON list, JSONL or CSV) or hub data set id. Your own file needs the columns
            ``prompt, subject, target_new``.
        limit: Take at most this many edits.
        offset: Leave out this many edits at the beginning.
        batch_size: Edits committed together in one step.
        target_window: Edits whose targets are fitted together, ahead of their commits. Changes speed and memory only.
        shuffle_seed: Shuffle the stream with this seed; by default the order of the file.
        on_error: What to do about a broken record: ``raise`` or ``skip`` (it is counted and named).
        split: Split of a hub data set.
        perplexity_path: Texts whose perplexity is measured before and after (a line each, or records with a ``text``
            field); by default sentences written for this project.
    """

    def __init__(
        self,
        source: Source = "builtin",
        path: str | None = None,
        limit: int | None = None,
        offset: int = 0,
        batch_size: int = 1,
        target_window: int = 32,
        shuffle_seed: int | None = None,
        on_error: OnError = "raise",
        split: str = "train",
        perplexity_path: str | None = None,
    ) -> None:
        super().__init__()
        check_least(1, **{"data.limit": limit, "data.batch_size": batch_size, "data.target_window": target_window})
        check_least(0, **{"data.offset": offset})
        self.source, self.path, self.limit, self.offset = source, path, limit, offset
        self.batch_size, self.target_window, self.shuffle_seed = batch_size, target_window, shuffle_seed
        self.on_error, self.split, self.perplexity_path = on_error, split, perplexity_path
        self.requests: list[EditRequest] = []
        self.skipped: list[tuple[str, str]] = []  # place and fault of each record that was left out
        self.perplexity_texts: list[str] = []

    @classmethod
    def from_requests(cls, requests: Sequence[EditRequest], **options: Any) -> EditDataModule:
        """Make a data module of requests that are at hand; ``offset``, ``limit`` and ``shuffle_seed`` apply to them.

        Raises:
            DataError: If there are none, or two have the same id.
        """
        module = cls(**options)
        if not requests:
            raise DataError("no edits to make")
        if twice := repeated(request.id for request in requests):
            raise DataError(f"duplicate id {twice[0]!r}")
        end = None if module.limit is None else module.offset + module.limit
        module.requests = list(requests)[module.offset : end]
        if not module.requests:
            raise DataError(f"no edits left behind data.offset={module.offset}: there are {len(requests)}")
        module._shuffle()
        return module

    def read(self) -> EditDataModule:
        """Read edits and texts, once; returns itself.

        Raises:
            DataError: If a record is broken (names file and line) or nothing is left.
        """
        if not self.requests:
            self.requests, self.skipped = load_requests(
                self.source, self.path, self.limit, self.offset, self.on_error, self.split
            )
            self._shuffle()
        if not self.perplexity_texts:
            self.perplexity_texts = perplexity_texts(self.perplexity_path)
        return self

    def _shuffle(self) -> None:
        if self.shuffle_seed is not None:
            random.Random(self.shuffle_seed).shuffle(self.requests)

    def setup(self, stage: str) -> None:
        """Read the data; called by Lightning."""
        self.read()

    def train_dataloader(self) -> StreamLoader:
        """Return the stream of edits."""
        return StreamLoader(self.requests, self.batch_size, self.target_window)

    def val_dataloader(self) -> StreamLoader | list[Any]:
        """Return all edits for measurement; nothing during ``fit``, which measures them itself at its end."""
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            return []
        return StreamLoader(self.requests, batch_size=64)

    def test_dataloader(self) -> StreamLoader:
        """Return all edits for measurement."""
        return StreamLoader(self.requests, batch_size=64)


def perplexity_texts(path: str | None = None) -> list[str]:
    """Return the texts whose perplexity is measured: those of a file, or sentences written for this project."""
    if path is None:
        return builtin_text("plain_sentences.txt").splitlines()
    texts = read_documents(expand(path))
    if not any(len(text.split()) > 1 for text in texts):
        raise DataError(f"{path}: perplexity needs texts of two words or more")
    return texts
