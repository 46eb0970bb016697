r"""Training the network of MEND (arXiv 2110.11309) on single edits.

Each record is an edit of the original model (the paper's section 3.2, algorithm 1): the gradient of its target's cross
entropy goes through the network, and the model with the update in place is judged by

.. math:: L = c_e\, L_e + L_{loc}, \quad
    L_e = -\log p_{\tilde\theta}(y_e \mid x'_e), \quad
    L_{loc} = \mathrm{KL}(p_\theta(\cdot \mid x_{loc}) \,\|\, p_{\tilde\theta}(\cdot \mid x_{loc})),

with the edit prompt and its paraphrases for :math:`x'_e`, and the prompts of the record's neighbours, at the tokens of
their own answers, for :math:`x_{loc}`. Published: :math:`c_e` = 0.1, Adam with 1e-6 for the network and 1e-4 for the
layers' rates, which begin at 1e-4, gradients clipped at 100, 10 edits per step of Adam, up to 500 000 steps; the
locality examples are drawn at random from another task.

The gradient does not depend on the network, nor does what lies below the edited layers: both are computed once per
record and kept. An epoch over known records therefore costs only passes of the few layers on top.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lit_edit.data.request import EditRequest
from lit_edit.editors.gradient.mend_network import MENDNetwork, NetworkOrigin
from lit_edit.editors.layer_choice import chosen_layers
from lit_edit.editors.lessons import Lesson, LessonLoss, target_lesson
from lit_edit.editors.token_gradients import collect_gradients
from lit_edit.errors import ArgumentError, check_not_negative, check_positive
from lit_edit.metrics.evaluation import EditMetrics, EditResult, evaluate_edits
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.language_model import LanguageModel
from lit_edit.text.tokens import continuation, pad_token
from lit_edit.training.data import RecordBatch


@dataclass(frozen=True)
class PreparedRecord:
    """What of a record does not depend on the network."""

    inputs: dict[int, Tensor]  # by layer, (tokens, d_in)
    gradients: dict[int, Tensor]  # by layer, (tokens, d_out)
    exam: Exam  # what the edited model is asked


class Exam(LessonLoss):
    """What a model is asked after an edit: rows of the edit itself (``taught``), and of what is to stay (``kept``).

    What lies below ``first``, the lowest layer that is edited, is run here, once; ``pad`` is any token id.
    """

    def __init__(
        self, adapter: ModelAdapter, taught: Sequence[Lesson], kept: Sequence[Lesson], first: int, pad: int
    ) -> None:
        super().__init__(adapter, [[*taught, *kept]], first, pad)
        self.split = sum(len(lesson.places) for lesson in taught)
        with torch.no_grad():  # states, not logits: a row of the vocabulary takes a hundred times the room
            self.original = self.states(adapter)[self.split :]

    def losses(self, edited: ModelAdapter) -> tuple[Tensor, Tensor]:
        """Return what an edited model is to lower: the edit's mean cross entropy, and how far others have moved.

        Both are means over tokens; the second is 0 where nothing else is asked.
        """
        logits = edited.logits(self.states(edited))
        nll = nn.functional.cross_entropy(logits[: self.split], self.words[: self.split])
        if not len(self.original):
            return nll, nll.new_zeros(())
        with torch.no_grad():
            original = edited.logits(self.original).log_softmax(-1)
        moved = logits[self.split :].log_softmax(-1)
        return nll, nn.functional.kl_div(moved, original, reduction="batchmean", log_target=True)


class MENDTraining(LightningModule):
    """Trains a :class:`~lit_edit.editors.gradient.mend_network.MENDNetwork` for a model; see this module.

    Validation edits each record that is held out, by itself, and measures it as a stream does: success, accuracy and
    magnitude of the edit, its paraphrases and its neighbours, and the drawdown, the neighbours' accuracy that is lost.

    Args:
        language_model: The model to train for; it is not changed.
        layers: Whose down projections are edited; the last three by default, as published.
        rank: Of the network's layers; 1920 as published.
        hidden: Its hidden layers; 1 as published.
        edit_rate: What the layers' rates begin with; 1e-4 as published, for larger models: it goes with the model.
        lr: Learning rate of the network.
        rate_lr: Learning rate of the rates.
        weight_decay: Of AdamW, on the network; the rates are not decayed.
        edit_weight: :math:`c_e`.
        locality_weight: Weight of the locality loss.
        paraphrases: Of each record, how many are asked beside the edit prompt, at most.
        neighbors: Of each record, how many of its neighbours are to stay, at most.
        warm_up: The normaliser sees so many records before the first step. It goes on with each record that is new.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        layers: Sequence[int] | None = None,
        rank: int = 1920,
        hidden: int = 1,
        edit_rate: float = 1e-4,
        lr: float = 1e-6,
        rate_lr: float = 1e-4,
        weight_decay: float = 0.0,
        edit_weight: float = 0.1,
        locality_weight: float = 1.0,
        paraphrases: int = 2,
        neighbors: int = 3,
        warm_up: int = 20,
    ) -> None:
        super().__init__()
        check_positive(lr=lr, rate_lr=rate_lr, edit_rate=edit_rate)
        check_not_negative(weight_decay=weight_decay, edit_weight=edit_weight, locality_weight=locality_weight)
        check_not_negative(paraphrases=paraphrases, neighbors=neighbors, warm_up=warm_up)
        self.language_model, self.layers = language_model, chosen_layers(layers)
        self.rank, self.hidden, self.edit_rate = rank, hidden, edit_rate
        self.lr, self.rate_lr, self.weight_decay = lr, rate_lr, weight_decay
        self.edit_weight, self.locality_weight = edit_weight, locality_weight
        self.paraphrases, self.neighbors, self.warm_up = paraphrases, neighbors, warm_up
        self.network: MENDNetwork | None = None
        self.after, self.before = EditMetrics(), EditMetrics()
        self.prepared: dict[str, PreparedRecord] = {}
        self.originals: dict[str, EditResult] = {}
        self.counted: set[str] = set()  # by the normaliser
        self._losses: list[float] = []

    # ---- set up ------------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the language model, and make the network for it."""
        if self.network is not None:
            return
        model, self.tokenizer = self.language_model.load()
        # No module of this one: it is neither trained, nor saved in checkpoints.
        self.adapter = ModelAdapter(model, self.language_model.arch, products=self.language_model.products)
        layers = self.layers or tuple(range(max(self.adapter.n_layers - 3, 0), self.adapter.n_layers))
        origin = NetworkOrigin.of(self.adapter, layers, self.language_model.name)
        network = MENDNetwork(origin, self.rank, self.hidden, self.edit_rate)
        self.network = network.to(torch.promote_types(self.adapter.dtype, torch.float32))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over the network, and over the rates with a learning rate of their own."""
        network = self._network
        others = [parameter for name, parameter in network.named_parameters() if name != "rates"]
        return torch.optim.AdamW(
            [
                {"params": others, "lr": self.lr, "weight_decay": self.weight_decay},
                {"params": [network.rates], "lr": self.rate_lr, "weight_decay": 0.0},
            ]
        )

    @property
    def _network(self) -> MENDNetwork:
        if self.network is None:
            raise ArgumentError("the network is made by configure_model, which the Trainer calls")
        return self.network

    def on_fit_start(self) -> None:
        """Bring the language model to where the network is."""
        model: nn.Module = self.adapter.model
        model.to(self.device)

    def on_train_start(self) -> None:
        """Let the normaliser see some records before the first step."""
        batches = islice(self.trainer.train_dataloader or (), self.warm_up)
        for request in islice((r for batch in batches for r in batch.requests), self.warm_up):
            self._known(request)

    # ---- one record --------------------------------------------------------------------------------------------------

    def _known(self, request: EditRequest, observe: bool = True) -> PreparedRecord:
        """Return what of a record does not depend on the network; a new one is counted by the normaliser."""
        if request.id not in self.prepared:
            # Validation runs in inference mode, whose tensors could not be used in training.
            with torch.inference_mode(False), torch.enable_grad():
                self.prepared[request.id] = self._prepare(request)
            if observe and request.id not in self.counted:
                self.counted.add(request.id)
                found = self.prepared[request.id]
                for layer in self._network.layers:
                    self._network.observe(layer, found.inputs[layer], found.gradients[layer])
        return self.prepared[request.id]

    def _prepare(self, request: EditRequest) -> PreparedRecord:
        tokenizer, layers, dtype = self.tokenizer, self._network.layers, self._network.rates.dtype
        pad = pad_token(tokenizer)
        edit = continuation(tokenizer, request.text, request.target_new)
        found = collect_gradients(self.adapter, [edit], layers, pad, everywhere=True)
        wordings = [continuation(tokenizer, text, request.target_new) for text in request.paraphrases]
        others = [continuation(tokenizer, probe.prompt, probe.answer) for probe in request.neighborhood]
        taught = [target_lesson(*row) for row in (edit, *wordings[: self.paraphrases])]
        kept = [target_lesson(*row) for row in others[: self.neighbors]]
        with self.adapter.fast_products():
            exam = Exam(self.adapter, taught, kept, layers[0], pad)
        return PreparedRecord(
            {layer: value.to(self.device, dtype) for layer, value in found.inputs.items()},
            {layer: value.to(self.device, dtype) for layer, value in found.gradients.items()},
            exam,
        )

    def edited(self, record: PreparedRecord) -> ModelAdapter:
        """Return a view of the model with a record's edit in place, as a function of the network's parameters."""
        weights = {}
        for layer in self._network.layers:
            update = self._network.update(layer, record.inputs[layer], record.gradients[layer])
            base = self.adapter.weight(layer)
            edited = (base.to(update) + self.adapter.to_layout(layer, update)).to(base.dtype)
            weights[self.adapter.weight_name(layer)] = edited
        return self.adapter.with_weights(weights)

    def _losses_of(self, record: PreparedRecord) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss of an edit, and its parts: of the edit and of what is to stay."""
        with self.adapter.fast_products():
            edit, locality = record.exam.losses(self.edited(record))
        return self.edit_weight * edit + self.locality_weight * locality, edit, locality

    # ---- training and validation -------------------------------------------------------------------------------------

    def training_step(self, batch: RecordBatch, batch_idx: int) -> Tensor:
        """Return the mean loss of some records, each edited by itself."""
        found = [torch.stack(self._losses_of(self._known(request))) for request in batch.requests]
        loss, edit, locality = torch.stack(found).mean(0)
        values = {"train/loss": loss, "train/edit_loss": edit, "train/locality_loss": locality}
        rates = {f"rate/{n}": r.detach() for n, r in zip(self._network.layers, self._network.rates, strict=True)}
        self.log_dict({**values, **rates}, batch_size=len(batch))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Begin to count anew."""
        self.after, self.before, self._losses = EditMetrics(), EditMetrics(), []

    def validation_step(self, batch: RecordBatch, batch_idx: int) -> None:
        """Edit each record and measure it, beside the original model."""
        for request in batch.requests:
            record = self._known(request, observe=False)
            self._losses.append(float(self._losses_of(record)[0]))
            if request.id not in self.originals:
                (self.originals[request.id],) = evaluate_edits(self.adapter, self.tokenizer, [request])
            before = self.originals[request.id]
            (after,) = evaluate_edits(self.edited(record), self.tokenizer, [request])
            self.after.update(after, before)
            self.before.update(before)

    def on_validation_epoch_end(self) -> None:
        """Log the measurements."""
        if not self._losses:
            return
        after, before = self.after.compute(), self.before.compute()
        loss = sum(self._losses) / len(self._losses)
        lost = (before["locality"]["accuracy"] or 0.0) - (after["locality"]["accuracy"] or 0.0)
        self.log_dict(
            {
                "val/loss": loss,
                "val/edit_success": _number(after["efficacy"]["success"]),
                "val/edit_accuracy": _number(after["efficacy"]["accuracy"]),
                "val/generalization": _number(after["generalization"]["success"]),
                "val/locality": _number(after["locality"]["success"]),
                "val/agreement": _number(after["locality"]["agreement"]),
                "val/drawdown": lost,
                "val/score": _number(after["score"]),
            },
            sync_dist=True,
        )

    def save_network(self, path: Path) -> None:
        """Write the network."""
        self._network.save(path, {"records": len(self.counted)})

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which records the normaliser has counted: it is to count each once."""
        checkpoint["counted"] = sorted(self.counted)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting where an earlier process has ended."""
        self.counted = set(checkpoint["counted"])


def _number(value: float | None, missing: float = math.nan) -> float:
    return missing if value is None else float(value)
