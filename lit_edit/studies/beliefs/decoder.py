"""The small decoder of the testbed, and how it learns.

A decoder that learns facts by heart stays for long at a plateau, where it knows which objects a relation has and not
who goes with what, because attention from the relation back to the subject has to form first (arXiv 2503.21676). Two
things make that short here. Embeddings begin with a standard deviation of 1 instead of 0.02: in a residual stream the
first layers' outputs else drown who the subject is. And a training begins with plain sentences, each a document of its
own; documents as they are follow once the decoder has left the plateau.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lit_edit.errors import check_least, check_not_negative, check_positive
from lit_edit.studies.beliefs.documents import BOS, EOS, PAD
from lit_edit.studies.beliefs.presets import PRESETS


@dataclass(frozen=True)
class TrainingConfig:
    """How a decoder is trained. Accuracy is the share of facts whose true object it says."""

    preset: str = "base"  # its size
    lr: float = 1e-3  # of AdamW, between its warm-up and its way down
    warm_up: int = 30  # steps
    weight_decay: float = 0.01
    batch_size: int = 128  # sentences per step, alone or in documents
    alone: float = 0.8  # accuracy from which on documents are read, not plain sentences alone; 0: from the start
    max_steps: int = 3000
    check_every: int = 50  # steps between two measurements of accuracy
    target: float = 0.9  # the accuracy, with documents, at which the way down begins
    settle: int = 200  # steps of the way down to a rate of zero: at the target, probabilities are still rough
    seed: int = 0  # of weights and order

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        check_least(1, **{name: getattr(self, name) for name in ("batch_size", "max_steps", "check_every", "settle")})
        check_positive(lr=self.lr)
        if not 0 < self.target <= 1:
            raise ValueError(f"target must be above 0 and at most 1, got {self.target}")
        if not 0 <= self.alone <= 1:
            raise ValueError(f"alone must be from 0 to 1, got {self.alone}")
        check_not_negative(warm_up=self.warm_up, weight_decay=self.weight_decay)


class DecoderTraining(LightningModule):
    """Trains a decoder on text; validation is exact match of objects, all their tokens being the first choice."""

    _COURSE = ("together", "settling", "accuracy")

    def __init__(self, config: TrainingConfig, vocabulary: int) -> None:
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.model: LlamaForCausalLM | None = None
        self.hits: list[Tensor] = []
        self.accuracy = 0.0
        self.together = config.alone == 0
        self.settling: int | None = None  # the step at which the way down begins, once it is known

    def configure_model(self) -> None:
        """Make the decoder, of the seed's weights."""
        if self.model is not None:
            return
        shape = PRESETS[self.config.preset]
        settings = LlamaConfig(  # type: ignore[call-arg] # its dataclass does not name all that it takes
            vocab_size=self.vocabulary,
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            intermediate_size=shape.inner,
            max_position_embeddings=1024,
            # Tied rows of subjects share what makes a subject likely, and are hard to tell apart on the way in.
            tie_word_embeddings=False,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
            attn_implementation="eager",  # faster than the fused one on short rows in bfloat16, on CPUs
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            self.model = LlamaForCausalLM(settings)
            # With the usual 0.02, what the first layers add drowns the subject, and the plateau is longer.
            torch.nn.init.normal_(self.model.model.embed_tokens.weight)

    def logits(self, ids: Tensor) -> Tensor:
        """Return ``(batch, time, vocabulary)``. Padding is on the right: no token that counts sees it."""
        assert self.model is not None  # noqa: S101 - for the type checker: Lightning has made it
        found: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return found

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        """Return the mean cross entropy of all tokens but the first."""
        logits = self.logits(batch[:, :-1]).float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=PAD)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget earlier measurements."""
        self.hits = []

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """See which objects the model says, in full precision, as it is asked later."""
        ids, starts = batch
        with torch.autocast(ids.device.type, enabled=False):
            choice, labels = self.logits(ids[:, :-1]).argmax(-1), ids[:, 1:]
        place = torch.arange(labels.shape[1], device=ids.device)
        asked = (place >= starts[:, None] - 1) & (labels != PAD)
        self.hits.append(((choice == labels) | ~asked).all(1))

    def on_validation_epoch_end(self) -> None:
        """Log the accuracy, and see whether it is time for the way down."""
        self.accuracy = float(torch.cat(self.hits).float().mean())
        self.log("val/accuracy", self.accuracy, prog_bar=True)
        if self.together and self.settling is None and self.accuracy >= self.config.target:
            self.settling = self.global_step

    def on_train_epoch_end(self) -> None:
        """See whether it is time for documents: the next epoch is read of them."""
        self.together = self.together or self.accuracy >= self.config.alone

    def on_train_batch_end(self, outputs: Any, batch: Tensor, index: int) -> None:
        """Stop at the end of the way down."""
        if self.done:
            self.trainer.should_stop = True

    @property
    def _begin(self) -> int:
        """Where the way down begins: at the target, and at the latest so that it ends with the last step."""
        latest = self.config.max_steps - self._length
        return latest if self.settling is None else min(self.settling, latest)

    @property
    def _length(self) -> int:
        return max(1, min(self.config.settle, self.config.max_steps // 2))

    @property
    def done(self) -> bool:
        """Whether the way down is over."""
        return self.global_step >= self._begin + self._length

    def rate(self, step: int) -> float:
        """Return the share of the learning rate at a step: up, level, and down to zero."""
        up = min(1.0, (step + 1) / max(self.config.warm_up, 1))
        return min(up, max(0.0, 1.0 - max(0, step - self._begin) / self._length))

    def configure_optimizers(self) -> Any:
        """Return AdamW with :meth:`rate`."""
        config = self.config
        # 0.98: a training is a few hundred steps, too few for an average over a thousand.
        optimizer = torch.optim.AdamW(
            self.parameters(), config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm to 1. Lightning's own refuses a fused optimizer, whose gradients could be scaled; none are."""
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the course depends on."""
        checkpoint["course"] = {name: getattr(self, name) for name in self._COURSE}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it up again."""
        for name in self._COURSE:
            setattr(self, name, checkpoint["course"][name])
