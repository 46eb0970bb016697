"""A world, its text and the decoder that reads it: trained once, then kept.

A trained model is a Hugging Face folder (safetensors) in the cache, named by the hash of all that it depends on. The
folder also holds ``corpus.txt``, the text it was trained on, from which editors take their key statistics, and
``beliefs.json``: the settings and what the training came to.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lit_edit.data.request import DataError
from lit_edit.errors import ArgumentError
from lit_edit.files.paths import cache_dir, write_json, write_text
from lit_edit.studies.beliefs.corpus import CorpusConfig, write_documents, write_sentences
from lit_edit.studies.beliefs.decoder import DecoderTraining, TrainingConfig
from lit_edit.studies.beliefs.documents import DocumentData, make_tokenizer
from lit_edit.studies.beliefs.presets import PRESETS
from lit_edit.studies.beliefs.world import World

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_FORMAT = 2  # of what a trained model depends on; a change makes new ones
RECORD = "beliefs.json"
CORPUS = "corpus.txt"


@dataclass(frozen=True)
class Trained:
    """A trained model."""

    folder: Path  # of Hugging Face
    accuracy: float  # share of all facts whose true object it says
    steps: int
    seconds: float  # that the training took; those of a process that was cut included up to its last measurement
    cpu: float  # seconds of CPU that it took, of all threads
    cached: bool = False  # whether it was there already

    @property
    def record(self) -> dict[str, float]:
        """What the training came to."""
        return {"accuracy": self.accuracy, "steps": self.steps, "seconds": self.seconds, "cpu": self.cpu}


@dataclass(frozen=True)
class Testbed:
    """A world, its text, and the decoder that reads it."""

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
            names = ("accuracy", "steps", "seconds", "cpu")
            return Trained(self.folder, **{name: record[name] for name in names}, cached=True)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def train(self, max_minutes: float | None = None, progress: bool = False) -> Trained:
        """Return the trained model, from the cache or after a training, which goes on where an earlier one was cut.

        After ``max_minutes`` of this process it is stopped. The model is then kept only if it has reached the target or
        its last step; else the next call goes on.

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
        plain = [sentence.text for sentence in sentences if sentence.kind == "plain"] if config.alone else ()
        size = max(1, config.batch_size // self.corpus.document)
        data = DocumentData(documents, facts, tokenizer, size, config.seed, plain, config.batch_size)
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
        write_text(made / CORPUS, "\n".join(documents) + "\n")
        write_json(made / RECORD, {**found.record, "parameters": model.num_parameters(), **more})
        shutil.rmtree(found.folder, ignore_errors=True)  # a damaged one, or one without its record
        made.replace(found.folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


# ---- how the training is run


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
        self.course.append({
            "step": trainer.global_step, "cpu": round(self.cpu, 1), "seconds": round(self.seconds, 1),
            "alone": alone, "loss": loss, "accuracy": accuracy,
        })  # fmt: skip
        log.info(
            "step %d, %.0f seconds of CPU: loss %.3f, accuracy %.3f%s",
            trainer.global_step, self.cpu, loss, accuracy, " (plain sentences)" if alone else "",
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "cpu": self.cpu, "course": list(self.course)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = (float(state_dict["seconds"]), float(state_dict["cpu"]))
        self.start, self.course = (perf_counter(), process_time()), list(state_dict["course"])


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


def _has_tiles() -> bool:
    """Tell whether products in bfloat16 are about ten times as fast as in float32: on CPUs with AMX, without a GPU."""
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return (
        tiles is not None and bool(tiles()) and not torch.cuda.is_available() and not torch.backends.mps.is_available()
    )
