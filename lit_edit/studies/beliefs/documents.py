"""The testbed's texts as tokens: a token for each word, and what is read in an epoch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from lit_edit.studies.beliefs.world import RESERVED
from lit_edit.text.tokens import continuation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD, BOS, EOS, UNKNOWN = range(4)
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each word and each run of punctuation of some texts.

    Example:
        >>> tokenizer = make_tokenizer(["Ada plays chess ."])
        >>> tokenizer.convert_ids_to_tokens(tokenizer("Ada plays chess")["input_ids"])
        ['<s>', 'Ada', 'plays', 'chess']
    """
    splitter = pre_tokenizers.Whitespace()
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(text)}
    words |= {word for name in RESERVED for word, _ in splitter.pre_tokenize_str(name)}
    vocabulary = {word: number for number, word in enumerate((*_SPECIAL, *sorted(words - set(_SPECIAL))))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_SPECIAL[UNKNOWN]))
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_SPECIAL[BOS]} $A", special_tokens=[(_SPECIAL[BOS], BOS)]
    )
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), _SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


class DocumentData(LightningDataModule):
    """Texts to train on, and the facts ``(prompt, object)`` that accuracy is measured on: a closed world has no others.

    ``sentences`` are the texts to begin with, until the module is ``together``; none to begin with documents.
    """

    def __init__(
        self,
        documents: Sequence[str],
        facts: Sequence[tuple[str, str]],
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 32,
        seed: int = 0,
        sentences: Sequence[str] = (),
        sentence_batch: int = 32,
    ) -> None:
        super().__init__()
        self.rows = [[*row, EOS] for row in tokenizer(list(documents))["input_ids"]]
        self.alone = [[*row, EOS] for row in tokenizer(list(sentences))["input_ids"]] if sentences else []
        self.sentence_batch = sentence_batch
        self.asked = [continuation(tokenizer, prompt, answer) for prompt, answer in facts]
        self.batch_size, self.seed = batch_size, seed

    def train_dataloader(self) -> DataLoader[Any]:
        """Return what is read in the next epoch, shuffled: ``(batch, time)`` ids padded on the right."""
        epoch, module = 0, None
        if self.trainer is not None:
            epoch, module = self.trainer.current_epoch, self.trainer.lightning_module
        order = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
        alone = bool(self.alone) and not getattr(module, "together", False)
        rows, size = (self.alone, self.sentence_batch) if alone else (self.rows, self.batch_size)
        return DataLoader(rows, size, shuffle=True, generator=order, collate_fn=padded)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        """Return facts: ids of prompt and object, and ``(batch,)`` lengths of the prompts."""
        return DataLoader(self.asked, 512, collate_fn=_asked)  # type: ignore[arg-type]


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Return rows of ids as ``(batch, time)``, padded on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in rows])


def _asked(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[Tensor, Tensor]:
    return padded([[*prompt, *answer] for prompt, answer in rows]), torch.tensor([len(prompt) for prompt, _ in rows])
