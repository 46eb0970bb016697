"""Training of SERAC's networks: ``lit-edit fit --config train/serac``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics.classification import BinaryAccuracy

from lit_edit.editors.lessons import LessonLoss, target_lesson
from lit_edit.editors.memory.serac_network import SeracNetwork, fingerprint, record_number, stated
from lit_edit.errors import check_least, check_positive
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.encoder import MINILM, Encoder, load_encoder
from lit_edit.models.language_model import LanguageModel
from lit_edit.text.tokens import continuation, pad_token
from lit_edit.training.scope_data import ScopePair

SMALL = LanguageModel()


class SeracTraining(LightningModule):
    """Fits the scope classifier and the counterfactual model together.

    The loss is the classifier's cross entropy plus the counterfactual model's negative log-likelihood of the new
    object, after the edit and a prompt in its scope. Only the classifier and the update of low rank are trained: the
    sentence encoder and the small model stay as they are.

    Args:
        language_model: The small model that becomes the counterfactual one; it must have the vocabulary of the model to
            edit, and may be that model.
        encoder: The sentence encoder: a packaged one, a folder, or a hub id.
        hidden: Hidden width of the classifier.
        layers: Layers whose down projections get an update; by default the last quarter.
        rank: Of the update.
        rows: Pairs of a step that the counterfactual model learns from, at most; the classifier learns from all of
            them. The language model takes most of the time, and needs fewer examples.
        lr: Learning rate of AdamW.
        weight_decay: Of AdamW.
    """

    def __init__(
        self,
        language_model: LanguageModel = SMALL,
        encoder: str = MINILM,
        hidden: int = 64,
        layers: list[int] | None = None,
        rank: int = 8,
        rows: int = 8,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__()
        check_least(1, hidden=hidden, rank=rank, rows=rows)
        check_positive(lr=lr)
        self.language_model, self.encoder, self.hidden = language_model, encoder, hidden
        self.layers, self.rank, self.rows, self.lr, self.weight_decay = layers, rank, rows, lr, weight_decay
        self.accuracy = BinaryAccuracy()
        self.network: SeracNetwork | None = None
        self.seen: set[int] = set()

    def load_encoder(self) -> Encoder:
        """Return the sentence encoder."""
        return load_encoder(self.encoder)

    def configure_model(self) -> None:
        """Load what is not trained, and make what is; called by Lightning."""
        if self.network is not None:
            return
        model, self.tokenizer = self.language_model.load()
        # Neither is a part of this module: their weights belong in no checkpoint.
        self._models: tuple[ModelAdapter, Encoder] = (
            ModelAdapter(model, self.language_model.arch),
            self.load_encoder(),
        )
        adapter = self._models[0]
        depth = adapter.n_layers
        layers = range(depth - max(1, depth // 4), depth) if self.layers is None else sorted(set(self.layers))
        for layer in layers:
            adapter.check_layer(layer)
        width = self._models[1](["a"]).shape[1]
        self.network = SeracNetwork(width, self.hidden, {i: adapter.shape(i) for i in layers}, self.rank)

    @property
    def _network(self) -> SeracNetwork:
        assert self.network is not None  # noqa: S101 - for the type checker
        return self.network

    def on_fit_start(self) -> None:
        """Put the small model beside what is trained."""
        self._models[0].model.to(self.device)  # type: ignore[arg-type]

    def losses(self, pairs: Sequence[ScopePair]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the classifier's loss, that of the counterfactual model, and the logits ``(pairs,)``."""
        encode = self._models[1]
        logits = self._network.classifier(
            encode([pair.asked for pair in pairs]).to(self.device),
            encode([pair.edit for pair in pairs]).to(self.device),
        )
        scope = binary_cross_entropy_with_logits(logits, self._inside(pairs).float())
        return scope, self._counterfactual([pair for pair in pairs if pair.inside][: self.rows]), logits

    def _counterfactual(self, pairs: Sequence[ScopePair]) -> Tensor:
        if not pairs:
            return torch.zeros((), device=self.device)
        adapter, lessons = self._models[0], []
        for pair in pairs:
            text = stated(pair.edit, pair.target) + pair.asked
            lessons.append([target_lesson(*continuation(self.tokenizer, text, pair.target))])
        loss_of = LessonLoss(adapter, lessons, self._network.layers[0], pad_token(self.tokenizer))
        return loss_of(self._network.weights(adapter)).mean()

    def _inside(self, pairs: Sequence[ScopePair]) -> Tensor:
        return torch.tensor([pair.inside for pair in pairs], device=self.device)

    def training_step(self, batch: list[ScopePair], index: int) -> Tensor:
        """Return the loss of some pairs."""
        scope, counterfactual, logits = self.losses(batch)
        self.seen |= {record_number(pair.edit) for pair in batch}
        own: Any = {"batch_size": len(batch)}
        self.log("train/scope_loss", scope, **own)
        self.log("train/counterfactual_nll", counterfactual, **own)
        self.log("train/scope_accuracy", ((logits > 0) == self._inside(batch)).float().mean(), prog_bar=True, **own)
        return scope + counterfactual

    def validation_step(self, batch: list[ScopePair], index: int) -> None:
        """Measure the pairs of held-out edits."""
        scope, counterfactual, logits = self.losses(batch)
        own: Any = {"batch_size": len(batch), "on_epoch": True, "on_step": False}
        self.accuracy(torch.sigmoid(logits), self._inside(batch))
        self.log("val/scope_accuracy", self.accuracy, prog_bar=True, **own)
        self.log("val/scope_loss", scope, **own)
        self.log("val/counterfactual_nll", counterfactual, **own)
        self.log("val/loss", scope + counterfactual, **own)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over both networks."""
        return torch.optim.AdamW(self._network.parameters(), self.lr, weight_decay=self.weight_decay)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the numbers of the edits that have been seen."""
        checkpoint["seen"] = sorted(self.seen)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them up again."""
        self.seen = set(checkpoint["seen"])

    def save_network(self, path: Path) -> None:
        """Write what the editor takes."""
        adapter = self._models[0]
        settings = {
            "language_model": self.language_model.name,
            "encoder": self.encoder,
            "checksum": fingerprint(adapter.own_weight(self._network.layers[-1]).detach()),
        }
        self._network.save(path, settings, self.seen)
