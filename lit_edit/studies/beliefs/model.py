"""The small decoder of the belief testbed: its tokenizer, its training, and where it is kept.

A trained model is a Hugging Face folder (safetensors) in the cache, named by the hash of all that it depends on. The
folder also holds ``corpus.txt``, the text it was trained on, from which editors take their key statistics, and
``beliefs.json``: the settings and what the training came to.

A decoder that learns facts by heart stays for long at a plateau, where it knows which objects a relation has and not
who goes with what, because attention from the relation back to the subject has to form first (arXiv 2503.21676). Two
things make that short here. Embeddings begin with a standard deviation of 1 instead of 0.02: in a residual stream the
first layers' outputs else drown who the subject is. And a training begins with plain sentences, each a document of its
own; documents as they are follow once the decoder has left the plateau.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lit_edit.data.request import DataError
from lit_edit.errors import ArgumentError
from lit_edit.files.paths import cache_dir, write_atomically, write_json
from lit_edit.studies.beliefs.corpus import CorpusConfig, write_documents, write_sentences
from lit_edit.studies.beliefs.presets import PRESETS
from lit_edit.studies.beliefs.world import RESERVED, World
from lit_edit.text.tokens import continuation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_FORMAT = 2  # of what a trained model depends on; a change makes new ones
RECORD = "beliefs.json"
CORPUS = "corpus.txt"
_PAD, _BOS, _EOS, _UNKNOWN = range(4)
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


@dataclass(frozen=True)
class TrainingConfig:
    """How a decoder is trained.

    Args:
        preset: Its size, of :data:`~lit_edit.studies.beliefs.presets.PRESETS`.
        lr: Learning rate of AdamW, between its warm-up and its way down.
        warm_up: Steps of the warm-up.
        weight_decay: Of AdamW.
        batch_size: Sentences per step, alone or in documents.
        alone: The accuracy (share of facts whose true object the model says) from which on documents are read, and no
            longer plain sentences alone. With 0, documents are read from the start.
        max_steps: Stop here at the latest.
        check_every: Steps between two measurements of accuracy.
        target: The accuracy, with documents, at which the way down begins.
        settle: Steps of the way down: the learning rate falls to zero, and the training ends. At the first step that
            reaches the target, probabilities are still rough.
        seed: Of weights and order.
    """

    preset: str = "base"
    lr: float = 1e-3
    warm_up: int = 30
    weight_decay: float = 0.01
    batch_size: int = 128
    alone: float = 0.8
    max_steps: int = 3000
    check_every: int = 50
    target: float = 0.9
    settle: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        for name in ("batch_size", "max_steps", "check_every", "settle"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        if not 0 < self.target <= 1:
            raise ValueError(f"target must be above 0 and at most 1, got {self.target}")
        if not 0 <= self.alone <= 1:
            raise ValueError(f"alone must be from 0 to 1, got {self.alone}")
        if self.warm_up < 0 or self.weight_decay < 0:
            raise ValueError("warm_up and weight_decay must not be negative")


@dataclass(frozen=True)
class Trained:
    """A trained model.

    Attributes:
        folder: Its Hugging Face folder.
        accuracy: Share of all facts whose true object it says.
        steps: Of training.
        seconds: That the training took; those of a process that was cut included up to its last measurement.
        cpu: Seconds of CPU that it took, of all threads.
        cached: Whether it was there already.
    """

    folder: Path
    accuracy: float
    steps: int
    seconds: float
    cpu: float
    cached: bool = False


# ---- tokens -------------------------------------------------------------------------------------------------------


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
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_SPECIAL[_UNKNOWN]))
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_SPECIAL[_BOS]} $A", special_tokens=[(_SPECIAL[_BOS], _BOS)]
    )
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), _SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


# ---- training -----------------------------------------------------------------------------------------------------


class DocumentData(LightningDataModule):
    """Texts to train on, and the facts that accuracy is measured on: a closed world has no others.

    Args:
        documents: The texts.
        facts: ``(prompt, object)`` of every fact.
        tokenizer: Of all.
        batch_size: Documents per step.
        seed: Of their order.
        sentences: The texts to begin with, until the module is ``together``; none to begin with documents.
        sentence_batch: Of them per step.
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
        self.rows = [[*row, _EOS] for row in tokenizer(list(documents))["input_ids"]]
        self.alone = [[*row, _EOS] for row in tokenizer(list(sentences))["input_ids"]] if sentences else []
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
    return torch.tensor([[*row, *[_PAD] * (longest - len(row))] for row in rows])


def _asked(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[Tensor, Tensor]:
    return padded([[*prompt, *answer] for prompt, answer in rows]), torch.tensor([len(prompt) for prompt, _ in rows])


class DecoderTraining(LightningModule):
    """Trains a decoder on text; validation is exact match of objects, all their tokens being the first choice.

    Args:
        config: How.
        vocabulary: Number of tokens.
    """

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
            pad_token_id=_PAD,
            bos_token_id=_BOS,
            eos_token_id=_EOS,
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
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=_PAD)
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
        asked = (place >= starts[:, None] - 1) & (labels != _PAD)
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
        checkpoint["course"] = {"together": self.together, "settling": self.settling, "accuracy": self.accuracy}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it up again."""
        course = checkpoint["course"]
        self.together, self.settling, self.accuracy = course["together"], course["settling"], course["accuracy"]


class _Clock(Callback):
    """Counts the seconds of a training over all its processes, and notes its course."""

    def __init__(self) -> None:
        self.before, self.start = (0.0, 0.0), (perf_counter(), process_time())
        self.course: list[dict[str, Any]] = []

    @property
    def seconds(self) -> float:
        return self.before[0] + perf_counter() - self.start[0]

    @property
    def cpu(self) -> float:
        """Of all threads: what the training costs, however busy the machine is."""
        return self.before[1] + process_time() - self.start[1]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = trainer.callback_metrics
        loss, accuracy = (round(float(found[name]), 4) for name in ("train/loss", "val/accuracy"))
        alone = not getattr(pl_module, "together", True)
        self.course.append(
            {
                **{"step": trainer.global_step, "cpu": round(self.cpu, 1), "seconds": round(self.seconds, 1)},
                **{"alone": alone, "loss": loss, "accuracy": accuracy},
            }
        )
        log.info(
            "step %d, %.0f seconds of CPU: loss %.3f, accuracy %.3f%s",
            trainer.global_step, self.cpu, loss, accuracy, " (plain sentences)" if alone else "",
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "cpu": self.cpu, "course": list(self.course)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = (float(state_dict["seconds"]), float(state_dict["cpu"]))
        self.start, self.course = (perf_counter(), process_time()), list(state_dict["course"])


@dataclass(frozen=True)
class Testbed:
    """A world, its text, and the decoder that reads it.

    Args:
        world: The world.
        corpus: How much text there is.
        training: How the decoder is trained.
    """

    world: World
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    __test__ = False  # not one of pytest's classes

    @property
    def settings(self) -> dict[str, Any]:
        """All that a trained model depends on, the world by the hash of its content."""
        facts = [[*fact, dict(distribution)] for fact, distribution in self.world.facts.items()]
        objects = {relation: list(names) for relation, names in self.world.objects.items()}
        content = json.dumps([facts, objects, dict(self.world.upstream)], ensure_ascii=False)
        return {
            "format": _FORMAT,
            "world": hashlib.sha256(content.encode()).hexdigest()[:16],
            "corpus": asdict(self.corpus),
            "training": asdict(self.training) | {"shape": asdict(PRESETS[self.training.preset])},
        }

    @property
    def folder(self) -> Path:
        """Where the trained model is kept."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]
        return cache_dir() / "beliefs" / digest

    def trained(self) -> Trained | None:
        """Return the trained model if it is there."""
        try:
            record = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
            return Trained(
                self.folder, record["accuracy"], record["steps"], record["seconds"], record["cpu"], cached=True
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def train(self, max_minutes: float | None = None, progress: bool = False) -> Trained:
        """Return the trained model, from the cache or after a training, which goes on where an earlier one was cut.

        Args:
            max_minutes: Stop after so many minutes of this process. The model is then kept only if it has reached the
                target or its last step; else the next call goes on.
            progress: Show a progress bar.

        Raises:
            ArgumentError: If the text is too long for the model, or another process is training it.
            TimeoutError: If the minutes are over before the training is.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder.with_name(f".{self.folder.name}.lock"), blocking=False):
                return self.trained() or self._train(max_minutes, progress)
        except Timeout:
            raise ArgumentError(
                f"another process is training this model ({self.folder}); wait for its end, and it is there"
            ) from None

    def _train(self, max_minutes: float | None, progress: bool) -> Trained:
        sentences = write_sentences(self.world, self.corpus)
        documents = write_documents(sentences, self.corpus)
        tokenizer = make_tokenizer([*documents, *(name for names in self.world.objects.values() for name in names)])
        facts = [
            (f"{subject} {relation}", self.world.true_object((subject, relation)))
            for subject, relation in self.world.facts
        ]
        config = self.training
        data = DocumentData(
            documents,
            facts,
            tokenizer,
            max(1, config.batch_size // self.corpus.document),
            config.seed,
            [sentence.text for sentence in sentences if sentence.kind == "plain"] if config.alone else (),
            config.batch_size,
        )
        longest = max(map(len, data.rows))
        if longest > 1024:
            raise DataError(
                f"a document has {longest} tokens, more than 1024: fewer sentences in one (document), please"
            )
        module, clock = DecoderTraining(config, len(tokenizer)), _Clock()
        partial = self.folder.with_name(f"{self.folder.name}.partial")
        trainer = _trainer(config, partial, clock, max_minutes, progress)
        newest = partial / "newest.ckpt"
        with warnings.catch_warnings():
            # The epoch starts over: its text once more in another order than the epochs before.
            warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
            trainer.fit(module, data, ckpt_path=newest if newest.is_file() else None, weights_only=True)
        if trainer.interrupted:
            trainer.save_checkpoint(newest)  # the next process is to go on from here, not from the last measurement
            raise KeyboardInterrupt
        if not module.done:
            raise TimeoutError(
                f"the training is at step {trainer.global_step} with an accuracy of {module.accuracy:.3f} after "
                f"{clock.seconds / 60:.1f} minutes; given again, the command goes on"
            )
        if module.accuracy < config.target:
            log.warning("the model says only %.1f %% of the facts after its last step", 100 * module.accuracy)
        found = Trained(self.folder, module.accuracy, trainer.global_step, clock.seconds, clock.cpu)
        assert module.model is not None  # noqa: S101 - for the type checker
        texts = documents[: -(-len(documents) // self.corpus.shuffles)]
        _keep(found, {"course": clock.course, "settings": self.settings}, module.model, tokenizer, texts)
        shutil.rmtree(partial, ignore_errors=True)
        return found


def _has_tiles() -> bool:
    """Tell whether products in bfloat16 are about ten times as fast as in float32: on CPUs with AMX, without a GPU."""
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return (
        tiles is not None and bool(tiles()) and not torch.cuda.is_available() and not torch.backends.mps.is_available()
    )


class _Minutes(Callback):
    """Ends a training after so many minutes of this process, but not before a step is done.

    Lightning's own timer goes on where the checkpoint's has stopped, so that a second process would have no time left.
    """

    def __init__(self, minutes: float) -> None:
        self.seconds, self.start = 60 * minutes, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        self.start = perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Stop when it is time."""
        trainer.should_stop |= perf_counter() - self.start > self.seconds


def _trainer(config: TrainingConfig, folder: Path, clock: _Clock, max_minutes: float | None, progress: bool) -> Trainer:
    return Trainer(
        max_steps=config.max_steps,
        max_epochs=-1,
        val_check_interval=config.check_every,
        check_val_every_n_epoch=None,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        accelerator="auto",
        precision="bf16-mixed" if _has_tiles() else "32-true",
        devices=1,
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=progress,
        default_root_dir=str(folder),
        callbacks=[
            clock,
            *([] if max_minutes is None else [_Minutes(max_minutes)]),
            # By another name than Lightning's own "last", which is saved only beside one of the best (save_top_k).
            ModelCheckpoint(
                folder, "newest", save_top_k=1, save_on_train_epoch_end=False, enable_version_counter=False
            ),
        ],
    )  # fmt: skip


def _keep(
    found: Trained,
    more: Mapping[str, Any],
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
) -> None:
    """Put a whole folder in place in one step."""
    found.folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=found.folder.parent, prefix=f".{found.folder.name}."))
    try:
        model.cpu().eval().save_pretrained(made)
        tokenizer.save_pretrained(made)
        write_atomically(made / CORPUS, lambda path: path.write_text("\n".join(documents) + "\n", encoding="utf-8"))
        result = {"accuracy": found.accuracy, "steps": found.steps, "seconds": found.seconds, "cpu": found.cpu}
        write_json(made / RECORD, {**result, "parameters": model.num_parameters(), **more})
        shutil.rmtree(found.folder, ignore_errors=True)  # a damaged one, or one without its record
        made.replace(found.folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
