"""The model of a stream: loaded with its ledger, kept in step with what a Trainer does to it, and taken away."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_edit.data.request import EditRequest
from lit_edit.devices.ranks import Payload, RankError, Ranks
from lit_edit.editors.base import Editor, Stopwatch
from lit_edit.ledger.edit_ledger import EditLedger
from lit_edit.ledger.ownership import Changed, put_right
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.described import check_if_new
from lit_edit.models.language_model import LanguageModel
from lit_edit.models.shards import gather_weights
from lit_edit.stats.second_moment import weights_hash
from lit_edit.stream.checkpoint_io import AtomicCheckpointIO
from lit_edit.stream.conflicts import ConflictPolicy
from lit_edit.stream.precision import check_precision, check_range, restore_tables, tables_of
from lit_edit.stream.session import EditSession, RefusalPolicy
from lit_edit.stream.strategies import cut_of, join_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class StreamModel(LightningModule):
    """Holds the model that a stream edits, with all that stands by it.

    Attributes:
        model: Once it is loaded.
        tokenizer: Its tokenizer.
        adapter: How editors see it.
        ledger: Its original weights and its edits.
        session: Makes edits and takes them out.
        base_hash: Of its original weights.
        ranks: The processes that share the stream.
        seconds: Spent by phase.
        status: Receives a line about what is going on.
        progress: Receives how much of it is done, of how much.
    """

    language_model: LanguageModel
    editor: Editor
    on_conflict: ConflictPolicy
    on_refused: RefusalPolicy
    changed: Changed
    tokenizer: PreTrainedTokenizerBase
    adapter: ModelAdapter
    ledger: EditLedger
    session: EditSession
    base_hash: str

    def __init__(self) -> None:
        super().__init__()
        self.model: PreTrainedModel | None = None
        self.ranks = Ranks()
        self.seconds: dict[str, float] = {}
        self.status: Callable[[str], None] = lambda message: None
        self.progress: Callable[[int, int], None] | None = None

    def configure_model(self) -> None:
        """Load the model and note its original weights, before anything can change them."""
        if self.model is not None:
            return
        with self._time("load"):
            self.model, self.tokenizer = self.language_model.load(cut_of(self.trainer) if self._attached else None)
            self._tables = tables_of(self.model)
            self.adapter = ModelAdapter(self.model, self.language_model.arch, products=self.language_model.products)
            # Layers that see padded blocks of rows run once per block: all ranks must then have the same blocks.
            self.adapter.ranks = replace(self.ranks, alike=self.adapter.sharded and not self.adapter.packs)
            if self.ranks.together:  # each may have measured otherwise
                self.adapter.pin_kernels(self.ranks.agree(self.adapter.kernels()))
            check_if_new(self.adapter)
            layers = self.editor.resolve_layers(self.adapter)
            if self.changed == "restore":
                put_right(self.model)
            self.ledger = EditLedger(self.adapter, layers, adopt=self.changed == "adopt")
            self.base_hash = weights_hash(self.model)
            self.session = EditSession(
                self.ledger, self.editor, self.language_model.name, self.base_hash, self.on_conflict, self.on_refused
            )
            self.session.status = lambda message: self.status(message)

    @property
    def _attached(self) -> bool:
        return self._trainer is not None

    def configure_optimizers(self) -> None:
        """Return nothing: there is no optimizer. Lightning's stand-in counts the commits."""
        return

    def setup(self, stage: str) -> None:
        """Refuse Trainer settings under which a stream would go wrong."""
        trainer = self.trainer
        self.ranks = join_ranks(trainer, self)
        check_precision(trainer)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if stage == "fit" and trainer.max_epochs != 1:
            trainer.fit_loop.max_epochs = 1  # a run is one pass over the stream

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return the batch as it is: it holds text."""
        return batch

    def _align(self) -> None:
        """Follow what Lightning has done to the model since it was loaded: another device, another type."""
        assert self.model is not None  # noqa: S101 - for the type checker: loaded by now
        restore_tables(self.model, self._tables)
        self.ledger.align()
        check_range(self.adapter)

    def _compare_ranks(self, requests: Sequence[EditRequest]) -> None:
        """Refuse to begin when another rank has loaded something else: a folder of its own that is older, for example.

        Raises:
            RankError: On all ranks; names the rank and what differs.
        """
        text = json.dumps([request.as_dict() for request in requests], sort_keys=True)
        own = {
            "base model": self.base_hash,
            "edits": hashlib.blake2b(text.encode(), digest_size=12).hexdigest(),
            "editor": type(self.editor).__name__,
            "layers": str(self.ledger.layers),
        }
        everyone = self.ranks.gather(own)
        for rank, theirs in enumerate(everyone):
            for what, value in theirs.items():
                if value != everyone[0][what]:
                    raise RankError(
                        f"rank {rank} has another {what} than rank 0 ({value} against {everyone[0][what]}): every rank "
                        "must read the same files; nothing was edited"
                    )

    def _time(self, phase: str) -> Any:
        return Stopwatch(self.seconds)(phase)

    def export(self, folder: str | Path) -> Path:
        """Write the edited model as a folder that ``AutoModelForCausalLM.from_pretrained`` loads, with a model card.

        Every rank must call it; the leader writes, and gathers the weights for that where each has a part.

        Args:
            folder: Where to; must be empty or not exist.

        Returns:
            The folder.
        """
        from lit_edit.export.model import ExportError, export_model

        if self.model is None:
            raise MisconfigurationException("there is nothing to export yet: call Trainer.fit(stream, data) first")
        self.ledger.verify(thorough=True)
        model, state = self.model, None
        if self.adapter.sharded:
            state = gather_weights(model, keep=self.ranks.leads)

        def work() -> Payload:
            name = self.language_model.name
            return str(export_model(model, self.tokenizer, self.ledger, Path(folder), name, state)), {}

        return Path(self.ranks.lead(work, (ExportError,))[0])
