"""Text for the key statistics: sampled from the model, from a file, or from a hub data set."""

from __future__ import annotations

import hashlib
import os
from itertools import groupby, islice

import torch
from transformers import PreTrainedTokenizerBase

from lit_edit.data.request import DataError
from lit_edit.data.texts import read_documents
from lit_edit.errors import ArgumentError
from lit_edit.files.checksum import hash_seed
from lit_edit.files.hub import hub_fault, reaching_hub
from lit_edit.files.paths import expand
from lit_edit.models.adapter import ModelAdapter
from lit_edit.text.tokens import encode

STARTS = (
    "The city of", "The capital of", "The history of", "The author of", "The founder of", "The president of",
    "The river", "The mountain", "The language of", "The people of", "The company", "The novel", "The film", "The band",
    "The painter", "The scientist", "The football player", "The singer", "The actor", "The king of", "The king",
    "The university of", "The museum of", "The name of", "The headquarters of", "The mother tongue of",
    "The inventor of", "The first man to", "Born in", "Located in", "Founded in", "Written by", "Named after",
    "Known for",
    "In the city of", "In 1950,", "In 2010,", "In the north of", "In Europe,", "In Africa,", "In Asia,", "In America,",
    "In music,",
    "According to", "Last year,", "Many people in", "People who live in", "My friend", "His wife", "Her brother",
    "Their house in", "My name is", "She was born in", "He was born in", "He plays", "She lives in", "They moved to",
    "It is made by", "It was developed by", "It is used to", "A famous", "A small town in", "A species of",
    "When I was", "When the war", "After the", "During the", "At the end of", "On the island of", "For the first time",
    "If you want to", "How to", "What is the", "Where is the", "Who was the", "Why do", "Scientists have", "Doctors",
    "The report", "The weather in", "The recipe", "The game", "The church of", "The bridge", "The song", "The team",
    "Two friends", "Once upon a time", "Dear", "However,", "There is", "There are", "We went to", "You can", "I think",
    "Most of the", "One of the", "Some of the", "The official language of", "The religion of", "The currency of",
)  # fmt: skip
"""Openings from which the model writes. Half of them ask for names of people, places and works: an edit is made at a
name, and what the statistics have seen of names is what it spares."""


class SampledText:
    """Text that the unedited model writes itself; needs no network and fits any model.

    ``rows`` sequences are sampled at a time, of ``length`` tokens: short ones, since the prompts of edits are short as
    well. Drawing from the ``top_k`` most probable tokens keeps the text language-like.
    """

    def __init__(
        self, seed: int = 0, rows: int = 128, length: int = 32, top_k: int = 50, starts: tuple[str, ...] = STARTS
    ) -> None:
        self.seed, self.rows, self.length, self.top_k, self.starts = seed, rows, length, top_k, starts

    def fingerprint(self) -> str:
        """Name the text: equal for equal text (given the model)."""
        starts = hashlib.sha256("\n".join(self.starts).encode()).hexdigest()[:8]
        return f"sampled2-seed{self.seed}-{self.rows}x{self.length}-top{self.top_k}-{starts}"

    def chunk(self, index: int, adapter: ModelAdapter, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Sample chunk ``index``; never ends. All rows have ``length`` tokens."""
        groups = self._openings(tokenizer)
        openings = groups[index % len(groups)]
        prompts = torch.tensor([openings[i % len(openings)] for i in range(self.rows)], device=adapter.device)
        new = max(1, self.length - prompts.shape[1])
        rows: list[list[int]] = adapter.sample(prompts, new, self.top_k, hash_seed(self.seed, index)).tolist()
        return rows

    def _openings(self, tokenizer: PreTrainedTokenizerBase) -> list[list[tuple[int, ...]]]:
        """Return the openings in groups of one length in tokens, for batches without padding; large groups only."""
        openings = sorted((encode(tokenizer, start) for start in self.starts), key=len)
        groups = [list(group) for _, group in groupby(openings, len)]
        return [group for group in groups if 3 * len(group) >= max(map(len, groups))]


class DocumentText:
    """Text of a list of documents, each cut to ``length`` tokens, ``rows`` documents a chunk.

    The name is what the cache calls them; the content is hashed as well.
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


def open_corpus(corpus: str, seed: int) -> Corpus:
    """Return the corpus that a setting names.

    ``"sampled"``, which is seeded; a path to ``.txt`` (a document per line), ``.json``, ``.jsonl`` or ``.csv`` with a
    text column; or the id of a hub data set, whose split ``train`` has a column ``text``.
    """
    if corpus == "sampled":
        return SampledText(seed=seed)
    path = expand(corpus)
    if os.path.isfile(path):
        return DocumentText(read_documents(path), name=path.stem)
    if "/" in corpus and not corpus.startswith((".", "/", "~")) and not path.suffix:
        return DocumentText(_hub_documents(corpus), name=corpus.replace("/", "--"))
    raise ArgumentError(
        f"model.statistics.corpus={corpus!r} is neither 'sampled', nor an existing file, nor a hub id (owner/name)"
    )


def _hub_documents(name: str) -> list[str]:
    from datasets import load_dataset

    try:
        with reaching_hub():
            rows = islice(load_dataset(name, split="train", streaming=True), 20_000)
            return [row["text"] for row in rows if isinstance(row["text"], str)]
    except Exception as error:  # the hub client raises many kinds; all mean the same to the user
        raise DataError(
            f"hub data set {name!r} (split 'train', column 'text') cannot be read: {hub_fault(error)}"
        ) from error
