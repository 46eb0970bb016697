"""Text for the key statistics: sampled from the model, from a file, or from a hub data set."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from lit_edit.data.request import DataError
from lit_edit.errors import ArgumentError
from lit_edit.models.adapter import ModelAdapter
from lit_edit.tokens import encode, pad_token

STARTS = (
    "The", "In", "A", "It", "He", "She", "They", "When", "After", "This", "There", "On", "At", "For", "If", "One",
    "However,", "In the", "During", "Since", "As", "We", "I", "You", "Many", "Some", "According to", "According", "My",
    "His", "Her", "Their", "By the", "From", "With", "While", "Although", "Because", "What", "How", "Where", "Who",
    "First,", "Today", "Last year", "The first", "The city of", "The company", "The capital", "The book", "Scientists",
    "People", "Children", "Most", "Each", "Every", "Two", "Three", "Once", "Before", "Between", "Under", "Over",
    "University of", "Born in",
)  # fmt: skip
"""Openings from which the model writes: ordinary English, so that its text is ordinary English too."""


class SampledText:
    """Text that the unedited model writes itself; needs no network and fits any model.

    Args:
        seed: Seeds the sampling, chunk by chunk.
        rows: Sequences sampled at a time.
        length: Tokens of each sequence.
        top_k: Sample among this many most probable tokens; keeps the text language-like.
        starts: Openings.
    """

    def __init__(
        self, seed: int = 0, rows: int = 96, length: int = 64, top_k: int = 50, starts: tuple[str, ...] = STARTS
    ) -> None:
        self.seed, self.rows, self.length, self.top_k, self.starts = seed, rows, length, top_k, starts

    def fingerprint(self) -> str:
        """Name the text: equal for equal text (given the model)."""
        starts = hashlib.sha256("\n".join(self.starts).encode()).hexdigest()[:8]
        return f"sampled-seed{self.seed}-{self.rows}x{self.length}-top{self.top_k}-{starts}"

    @torch.no_grad()
    def chunk(self, index: int, adapter: ModelAdapter, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Sample chunk ``index``; never ends. All rows have ``length`` tokens."""
        devices = [adapter.device] if adapter.device.type == "cuda" else []
        openings = self._openings(tokenizer)
        prompts = [openings[(index * self.rows + i) % len(openings)] for i in range(self.rows)]
        ids = torch.tensor(prompts, device=adapter.device)
        new = max(1, self.length - ids.shape[1])
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(hash_seed(self.seed, index))
            out = adapter.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=self.top_k,
                max_length=None,
                max_new_tokens=new,
                min_new_tokens=new,
                pad_token_id=pad_token(tokenizer),
            )
        rows: list[list[int]] = out.tolist()
        return rows

    def _openings(self, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
        """Return the openings of the commonest length in tokens: they can be sampled in one batch, without padding."""
        by_length: dict[int, list[tuple[int, ...]]] = {}
        for start in self.starts:
            ids = encode(tokenizer, start)
            by_length.setdefault(len(ids), []).append(ids)
        return max(by_length.values(), key=len)


class DocumentText:
    """Text of a list of documents, each cut to ``length`` tokens.

    Args:
        documents: The texts.
        name: What to call them in the cache; the content is hashed as well.
        rows: Documents per chunk.
        length: Tokens kept of each document.
    """

    def __init__(self, documents: list[str], name: str, rows: int = 256, length: int = 512) -> None:
        self.documents, self.name, self.rows, self.length = documents, name, rows, length

    def fingerprint(self) -> str:
        """Name the text by its content."""
        digest = hashlib.sha256("\x00".join(self.documents).encode()).hexdigest()[:16]
        return f"{self.name}-{digest}-{self.rows}x{self.length}"

    def chunk(self, index: int, adapter: ModelAdapter, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Return chunk ``index``; empty when the text is used up."""
        texts = self.documents[index * self.rows : (index + 1) * self.rows]
        return [list(encode(tokenizer, text)[: self.length]) for text in texts if text.strip()]


Corpus = SampledText | DocumentText


def open_corpus(corpus: str, seed: int, hub_split: str = "train", hub_column: str = "text") -> Corpus:
    """Return the corpus that a setting names.

    Args:
        corpus: ``"sampled"``; a path to ``.txt`` (a document per line), ``.json``, ``.jsonl`` or ``.csv`` with a text
            column; or the id of a hub data set.
        seed: For sampling.
        hub_split: Split of a hub data set.
        hub_column: Column that holds the text, in hub data sets.

    Raises:
        DataError: If the file holds no text.
        ArgumentError: If the name is neither ``sampled``, nor a file, nor a hub id.
    """
    if corpus == "sampled":
        return SampledText(seed=seed)
    path = Path(corpus).expanduser()
    if path.is_file():
        return DocumentText(read_documents(path), name=path.stem)
    if "/" in corpus and not corpus.startswith((".", "/", "~")) and not path.suffix:
        return DocumentText(_hub_documents(corpus, hub_split, hub_column), name=corpus.replace("/", "--"))
    raise ArgumentError(
        f"model.statistics.corpus={corpus!r} is neither 'sampled', nor an existing file, nor a hub id (owner/name)"
    )


def read_documents(path: Path) -> list[str]:
    """Read texts from a file: lines of text, or records with a ``text`` or ``Text`` field.

    Raises:
        DataError: If it cannot be read or holds no text; names the file.
    """
    try:
        raw = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            records = json.loads(raw)
        elif path.suffix == ".jsonl":
            records = [json.loads(line) for line in raw.splitlines() if line.strip()]
        elif path.suffix == ".csv":
            records = list(csv.DictReader(raw.splitlines()))
        else:
            records = raw.splitlines()
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from error
    texts = [_text_of(record) for record in records] if isinstance(records, list) else []
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise DataError(f"{path}: holds no text (expected lines, or records with a 'text' field)")
    return texts


def _text_of(record: object) -> str:
    if isinstance(record, dict):
        record = record.get("text", record.get("Text", ""))
    return record if isinstance(record, str) else ""


def _hub_documents(name: str, split: str, column: str, limit: int = 20_000) -> list[str]:
    from datasets import load_dataset

    rows: Iterator[dict[str, str]] = iter(load_dataset(name, split=split, streaming=True))
    return [row[column] for row, _ in zip(rows, range(limit), strict=False)]


def hash_seed(*parts: object) -> int:
    """Derive a 63-bit seed from anything printable, the same on every machine."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
