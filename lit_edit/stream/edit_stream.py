"""EditStream: a stream of edits as a LightningModule. It decides the order of calls; formulas live elsewhere."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_edit.data.datamodule import EditBatch, StreamLoader
from lit_edit.data.request import EditRequest
from lit_edit.devices.ranks import Payload, RankError, Ranks
from lit_edit.editors.base import Editor, EditorInfo, Proposal, Stopwatch
from lit_edit.editors.closed_form.d4s import D4S
from lit_edit.errors import ArgumentError
from lit_edit.files.interrupts import deferred_interrupts
from lit_edit.ledger.edit_ledger import EditLedger
from lit_edit.ledger.journal import Journal
from lit_edit.ledger.shared_journal import SharedJournal
from lit_edit.metrics.evaluation import (
    EditMetrics,
    EditResult,
    Summary,
    evaluate_edits,
    flatten,
    measure_perplexity,
    summarise,
)
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.described import check_passes
from lit_edit.models.language_model import LanguageModel
from lit_edit.models.shards import gather_weights
from lit_edit.stats.second_moment import KeyStatistics, weights_hash
from lit_edit.stream.checkpoints import AtomicCheckpointIO
from lit_edit.stream.conflicts import ConflictPolicy
from lit_edit.stream.precision import check_precision, check_range, passes_of, restore_tables, tables_of
from lit_edit.stream.session import EditSession, RefusalPolicy, check_request
from lit_edit.stream.strategies import cut_of, join_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

_FORMAT = 2  # of what a checkpoint holds


class EditStream(LightningModule):
    """Edits a language model, one step after another, without an optimizer.

    A training step reads targets and keys, the editor's closed form gives the updates, and :meth:`apply_edit` commits
    them through the ledger and counts one step: ``trainer.global_step`` is the number of commits. Override or wrap
    :meth:`apply_edit` to look at, change or refuse updates.

    Args:
        language_model: The model to edit: its settings, or just its name.
        editor: The method; :class:`lit_edit.editors.D4S` by default.
        statistics: Where the second moments of the keys come from.
        measure_each: Measure each edit right after it was made (``immediate`` in the summary).
        on_conflict: What to do about an edit of a fact that has been edited before: ``replace`` (the earlier edit is
            taken out in the same step), ``average`` (both stay, and the solver finds the middle), or ``refuse`` (it is
            not made, and the stream goes on).
        on_refused: What to do when an edit must not be written (its target diverges, a key or a weight would not be
            finite): ``stop`` the run, or ``skip`` the edit, which is put on record.
        journal: File in which every edit is recorded before it is written. The command line keeps it in the run folder;
            without it the record stays in memory and in checkpoints.

    Example:
        >>> stream = EditStream("smollm2-135m")  # loads nothing yet
        >>> type(stream.editor).__name__
        'D4S'
    """

    def __init__(
        self,
        language_model: LanguageModel = LanguageModel(),  # noqa: B008 - frozen
        editor: Editor | None = None,
        statistics: KeyStatistics = KeyStatistics(),  # noqa: B008 - frozen
        measure_each: bool = True,
        on_conflict: ConflictPolicy = "replace",
        on_refused: RefusalPolicy = "stop",
        journal: str | None = None,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("on_conflict", on_conflict, ("replace", "average", "refuse")),
            ("on_refused", on_refused, ("stop", "skip")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints hold updates, not the model
        self.language_model = LanguageModel(language_model) if isinstance(language_model, str) else language_model
        self.editor = D4S() if editor is None else editor
        self.statistics = statistics
        self.measure_each = measure_each
        self.on_conflict, self.on_refused, self.journal = on_conflict, on_refused, journal
        self.model: PreTrainedModel | None = None
        self.ranks = Ranks()
        self.results: dict[str, dict[str, EditResult]] = {"base": {}, "immediate": {}, "final": {}}
        self.perplexities: dict[str, dict[str, float]] = {}
        self.seconds: dict[str, float] = {}
        self.extra: dict[str, Any] = {}  # what callbacks have measured; by stage, or beside the stages
        self.status: Callable[[str], None] = lambda message: None
        self.progress: Callable[[int, int], None] | None = None
        self._restored: dict[str, Any] | None = None  # of a checkpoint, until the editor is ready for it
        self._prepared = False
        self._measured_at: tuple[int, ...] | None = None  # the edits that held when the end was measured
        self._measured: EditMetrics | None = None
        self._open = 0  # edits of the step at hand that are made while its measurements and logs are not
        self._reopened = 0  # the same of an earlier process, before its step is taken up

    # ---- model --------------------------------------------------------------------------------------------------

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
            if self.language_model.arch is not None:
                check_passes(self.adapter)
            self.ledger = EditLedger(self.adapter, self.editor.resolve_layers(self.adapter))
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

    # ---- the stream ---------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Bring the ledger to the model's device and type, and hide Lightning's advice that does not apply."""
        self._align()
        self._attach_journal()
        for message in (".*does not have many workers.*", ".*is in eval mode.*", ".*module.s. in eval mode.*"):
            warnings.filterwarnings("ignore", message)

    def _align(self) -> None:
        """Follow what Lightning has done to the model since it was loaded: another device, another type."""
        assert self.model is not None  # noqa: S101 - for the type checker: loaded by now
        restore_tables(self.model, self._tables)
        self.ledger.align()
        check_range(self.adapter)

    def on_train_start(self) -> None:
        """Prepare the editor and measure the unedited model, or take everything up where an earlier process left it."""
        requests = self.stream_requests()
        if self.editor.one_by_one and self._loader().batch_size > 1:
            raise MisconfigurationException(
                f"{type(self.editor).__name__} makes one edit at a time, got "
                f"data.batch_size={self._loader().batch_size}: set it to 1, or use a batch method (lit-edit editors)"
            )
        self._compare_ranks(requests)
        about: EditorInfo | None = getattr(self.editor, "about", None)
        if about is not None and about.lacks and about.kind in ("memory", "in context", "hyper-network"):
            log.info("%s, by its nature: %s", about.title, about.lacks)
        self._take_up()
        self._reopened, self._open = self._reopened + self._open, 0
        loader = self._loader()
        behind = self._position(requests)
        loader.seek((behind - 1 if self._reopened else behind) // loader.batch_size)
        by_id = {request.id: request for request in requests}
        for entry in self.ledger.history.made[self.ledger.history.carried :]:
            check_request(by_id[entry.id], entry.request)
        missing = [r for r in [*requests, *self.committed_requests()] if r.id not in self.results["base"]]
        if missing:
            self.status("measuring the unedited model")
            results, _ = self.measure(missing, self.ledger.original(), with_perplexity=False)
            self.results["base"] |= results
        if "base" not in self.perplexities:
            self.perplexities["base"] = self._perplexity(self.ledger.original())
        if not self.edits_made:
            self.log_at_edit(flatten(self.summary_of("base", requests), "base"))

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

    def _take_up(self) -> None:
        """Open the journal, prepare the editor, and begin a stream or go on where an earlier process left it."""
        self._attach_journal()
        self.session.pin_kernels()
        self._prepare_editor()
        self.session.begin()

    def _attach_journal(self) -> None:
        if self.journal is not None and self.ledger.journal.path is None:
            path = Path(self.journal).expanduser()
            together = self.ranks.together
            self.ledger.take_up(SharedJournal(self.ranks, path, True) if together else Journal(path, repair=True))

    def open(self, saved: Mapping[str, Any] | None = None) -> EditSession:
        """Bring the model to where its journal ends, without a Trainer: to take edits out, for example.

        Args:
            saved: What a checkpoint holds under ``lit_edit``, to do less again.

        Returns:
            The session that makes further changes.
        """
        self.configure_model()
        if saved is not None:
            self.restore(saved)
        self._take_up()
        self.session.repeat_all()
        return self.session

    def _prepare_editor(self) -> None:
        if not (self._prepared and self.ledger.made) or self._restored is not None:
            with self._time("statistics"):
                self.editor.prepare(self.ledger, self.tokenizer, self.statistics, self.status, self.progress)
            self._prepared = True
        if self._restored is not None:
            self.editor.load_state_dict(self._restored["editor"])
            self._restored = None

    def training_step(self, batch: EditBatch, batch_idx: int) -> None:
        """Make the edits of one step."""
        start = perf_counter()
        # An earlier process may have died behind the commit: what follows it is done here.
        again, self._reopened = self._reopened, 0
        before = self.ledger.made - again
        proposal = self.session.propose(batch.requests, batch.window)
        if proposal is not None:
            self.apply_edit(proposal)
        made = self.ledger.history.made[before:]
        if not made:
            if proposal is not None:
                self.session.refuse([entry.id for entry in proposal.entries], "declined by apply_edit")
            return
        self._open = len(made)
        spent = perf_counter() - start
        for phase, seconds in {**(proposal.seconds if proposal else {}), "edits": spent}.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        metrics = {f"edit/{name}": sum(e.facts[name] for e in made) / len(made) for name in made[0].facts}
        metrics["time/edit"] = spent / len(made)
        ids = {entry.id for entry in made}
        if self.measure_each:
            metrics |= self._measure_immediate([r for r in batch.requests if r.id in ids])
        self.log_dict(metrics, logger=False, batch_size=len(made))
        self.log_at_edit(metrics)

    def on_train_batch_end(self, outputs: Any, batch: EditBatch, batch_idx: int) -> None:
        """Note that all is done and said of the step."""
        self._open = 0

    @property
    def is_at_end(self) -> bool:
        """Whether every edit of the stream has been dealt with, made or refused."""
        return len(self.ledger.history.handled) >= len(self.stream_requests())

    @property
    def edits_made(self) -> int:
        """How many edits this stream has made, whether they hold still or not: what logs count by."""
        return self.ledger.made - self.ledger.history.carried - self._reopened

    def _measure_immediate(self, requests: Sequence[EditRequest]) -> dict[str, float]:
        immediate = self.results["immediate"]
        if missing := [r for r in requests if r.id not in immediate]:
            self.status("measuring the edit")
            immediate |= self.measure(missing, self.adapter, with_perplexity=False)[0]
        return flatten(summarise([immediate[r.id] for r in requests], self.results["base"]), "immediate")

    def apply_edit(self, proposal: Proposal) -> None:
        """Commit one step's updates: the hook where weights change, in place of an optimizer.

        The ledger writes all layers or none; only then the editor takes the facts into its state and the step counts.

        Args:
            proposal: What the editor wants written.

        Raises:
            EditRefusedError: If the updates are not finite or do not fit; nothing has changed then.
        """
        before = self.ledger.made
        with deferred_interrupts():  # a Ctrl-C in between would leave a commit that does not count
            self.session.apply(proposal)
            self.optimizers().step()  # type: ignore[union-attr]
            self._open = self.ledger.made - before

    def finish(self) -> Summary:
        """Measure all committed edits once more, at the end; does it once and returns the whole summary."""
        if self.ledger.ahead:  # edits may have been taken out by hand since the run came to its end
            if not self._prepared:  # and then there was nothing to train
                self._take_up()
            self.session.repeat_between_steps()
        done = self.committed_requests()
        held = tuple(entry.number for entry in self.ledger.entries)
        if self._measured_at != held:
            self._measured_at = held
            self.status("measuring all edits")
            self.results["final"], self.perplexities["final"] = self.measure(done, self.adapter)
            self.log_at_edit(flatten(self.summary_of("final", done), "final"))
        return self.summary()

    def on_fit_end(self) -> None:
        """Measure the finished stream, if no callback has asked for it before."""
        self.finish()

    def stream_requests(self) -> tuple[EditRequest, ...]:
        """Return all edits of the stream, in order.

        Raises:
            MisconfigurationException: If the training data is not an edit stream.
        """
        return self._loader().requests

    def _loader(self) -> StreamLoader:
        loader = self.trainer.train_dataloader
        if not isinstance(loader, StreamLoader):
            raise MisconfigurationException(
                f"EditStream needs the loader of an EditDataModule, got {type(loader).__name__}: an ordinary "
                "DataLoader cannot resume, it would make the first edits twice and the last ones never"
            )
        return loader

    def committed_requests(self) -> list[EditRequest]:
        """Return the edits that hold, in the order of making, those of earlier streams included.

        Raises:
            MisconfigurationException: If they are not those of the stream at hand.
        """
        requests = self.stream_requests()
        self._position(requests)
        by_id = {r.id: r for r in requests}
        return [
            by_id[entry.id] if entry.number > self.ledger.history.carried else EditRequest.from_dict(entry.request)
            for entry in self.ledger.entries
        ]

    def _position(self, requests: Sequence[EditRequest]) -> int:
        """Return how many edits of the stream are behind us, made or refused, and check that they are its first."""
        handled, step = self.ledger.history.handled, self._loader().batch_size
        # Of the last step some may have been refused and nothing said of the others yet: a process died in between.
        first = {request.id for request in requests[: -(-len(handled) // step) * step]}
        for number, name in enumerate(handled):
            if name not in first:
                ahead = repr(requests[number].id) if number < len(requests) else "missing"
                raise MisconfigurationException(
                    f"the checkpoint's edit {number + 1} is {name!r}, the stream's is {ahead}: resume with the data "
                    "it was made with"
                )
        if len(set(handled)) > len(requests):
            raise MisconfigurationException(
                f"the checkpoint has dealt with {len(handled)} edits, the stream has {len(requests)}: resume with the "
                "data it was made with"
            )
        return len(handled)

    # ---- measuring ----------------------------------------------------------------------------------------------

    def measure(
        self, requests: Sequence[EditRequest], adapter: ModelAdapter, with_perplexity: bool = True
    ) -> tuple[dict[str, EditResult], dict[str, float]]:
        """Return results by id, and perplexity, of a model as it is now."""
        with self._time("metrics"), torch.no_grad(), passes_of(self._trainer):
            results = {r.id: r for r in evaluate_edits(adapter, self.tokenizer, requests)}
        return results, self._perplexity(adapter) if with_perplexity else {}

    def _perplexity(self, adapter: ModelAdapter) -> dict[str, float]:
        texts = getattr(getattr(self.trainer, "datamodule", None), "perplexity_texts", [])
        return self.measure_texts(texts, adapter)

    def measure_texts(self, texts: Sequence[str], adapter: ModelAdapter, leading: bool = True) -> dict[str, float]:
        """Return mean, median and corpus perplexity of texts; nothing if there are none."""
        if not texts:
            return {}
        with self._time("metrics"), torch.no_grad(), passes_of(self._trainer):
            return measure_perplexity(adapter, self.tokenizer, texts, leading)

    def summary_of(self, stage: str, requests: Sequence[EditRequest]) -> Summary:
        """Return the metrics of one stage (``base``, ``immediate`` or ``final``) over some edits."""
        results = [self.results[stage][r.id] for r in requests if r.id in self.results[stage]]
        return summarise(results, self.results["base"], self.perplexities.get(stage, {}).get("mean"))

    def summary(self) -> Summary:
        """Return what ``summary.json`` holds."""
        done = self.committed_requests()
        seconds = {name: self.seconds.get(name, 0.0) for name in ("statistics", "targets", "keys", "solve", "metrics")}
        seconds["per_edit"] = self.seconds.get("edits", 0.0) / max(1, len(done))
        stages = {stage: self.summary_of(stage, done) for stage in ("base", "immediate", "final")}
        return {
            **self.extra,
            "edits": len(done),
            "undone": len(self.ledger.history.undone),
            "refused": len(self.ledger.history.refused),
            **{stage: {**self.extra.get(stage, {}), **found} for stage, found in stages.items()},
            "perplexity": self.perplexities,
            "seconds": seconds,
            "layers": self.ledger.layer_norms(),
        }

    def log_at_edit(self, metrics: Mapping[str, float]) -> None:
        """Send metrics to every logger, with the number of committed edits as step."""
        for logger in self.loggers:
            logger.log_metrics(dict(metrics), step=self.edits_made)

    def measuring(self) -> AbstractContextManager[Any]:
        """Return a context for measurements of one's own: their time is counted, no gradients, the run's precision."""
        stack = ExitStack()
        for context in (self._time("metrics"), torch.no_grad(), passes_of(self._trainer)):
            stack.enter_context(context)
        return stack

    def _time(self, phase: str) -> Any:
        return Stopwatch(self.seconds)(phase)

    # ---- validate and test: measure, never edit -----------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Begin a measurement of the model as it is."""
        # Every rank measures all of it: there is nothing to be averaged over ranks.
        warnings.filterwarnings("ignore", ".*sync_dist=True.*")
        self._align()
        self._measured = EditMetrics()
        self._measured_perplexity = self._perplexity(self.adapter)

    def validation_step(self, batch: EditBatch, batch_idx: int) -> None:
        """Measure some edits."""
        results, _ = self.measure(batch.requests, self.adapter, with_perplexity=False)
        missing = [r for r in batch.requests if r.id not in self.results["base"]]
        if missing:
            base, _ = self.measure(missing, self.ledger.original(), with_perplexity=False)
            self.results["base"] |= base
        assert self._measured is not None  # noqa: S101 - for the type checker: set at the start of the epoch
        for result in results.values():
            self._measured.update(result, self.results["base"][result.id])

    def on_validation_epoch_end(self) -> None:
        """Report the measurement."""
        self._report_measured("validate")

    def on_test_epoch_start(self) -> None:
        """Begin a measurement of the model as it is."""
        self.on_validation_epoch_start()

    def test_step(self, batch: EditBatch, batch_idx: int) -> None:
        """Measure some edits."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Report the measurement."""
        self._report_measured("test")

    def _report_measured(self, stage: str) -> None:
        assert self._measured is not None  # noqa: S101
        summary = {**self._measured.compute(), "perplexity": self._measured_perplexity.get("mean")}
        # Lightning takes "step" for the step to log at, which else would be 0.
        self.log_dict({**flatten(summary, stage), "step": float(self.edits_made)})
        self._measured = None  # float64 sums, which must not follow the model to a device without float64

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put updates and state into the checkpoint, in place of the model's weights."""
        for logger in self.loggers:  # what the checkpoint knows of must not be in a logger's hands only
            logger.save()
        checkpoint["state_dict"] = {}
        checkpoint["lit_edit"] = {
            "format": _FORMAT,
            "base_hash": self.base_hash,
            "ledger": self.ledger.state_dict(),
            "editor": self.editor.state_dict() if self._restored is None else self._restored["editor"],
            "results": {
                stage: [result.as_state() for result in results.values()] for stage, results in self.results.items()
            },
            "perplexities": self.perplexities,
            "seconds": dict(self.seconds),
            "open": self._open + self._reopened if self.trainer.interrupted else 0,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the saved updates into the freshly loaded model.

        Raises:
            ArgumentError: If the checkpoint is not one of lit-edit, or was made with another model or config.
        """
        saved = checkpoint.get("lit_edit")
        if not isinstance(saved, Mapping) or saved.get("format") != _FORMAT:
            raise ArgumentError("this checkpoint was not written by this version of lit-edit")
        self.restore(saved)
        stream = getattr(getattr(self.trainer, "datamodule", None), "requests", ())
        if len(self.ledger.history.handled) < len(stream) and "loops" in checkpoint:
            # A run stopped by max_steps counts its epoch as done, but the stream goes on.
            for progress in ("total", "current"):
                checkpoint["loops"]["fit_loop"]["epoch_progress"][progress] |= {"processed": 0, "completed": 0}
        if self._reopened and "loops" in checkpoint:  # its step is done once more, but for the commit
            for progress in checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"].values():
                if isinstance(progress, dict):
                    progress["processed"] = progress["completed"]

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Write the updates that a checkpoint holds under ``lit_edit``.

        Raises:
            ArgumentError: If they belong to another model or another config.
        """
        self.configure_model()
        if saved["base_hash"] != self.base_hash:
            raise ArgumentError(
                f"the checkpoint edits other base weights than those of {self.language_model.name!r} "
                f"(hash {saved['base_hash']} against {self.base_hash}); load the model it was made with"
            )
        begun = bool(saved["ledger"]["history"]["made"])  # a run cut before its first edit starts anew
        if begun:
            self.editor.check_state(saved["editor"], self.ledger.layers)
        self.ledger.load_state_dict(saved["ledger"])
        self.results = {
            stage: {state["id"]: EditResult.from_state(state) for state in states}
            for stage, states in saved["results"].items()
        }
        self.perplexities = dict(saved["perplexities"])
        self.seconds = {**saved["seconds"], "load": self.seconds.get("load", 0.0)}
        self._restored = {"editor": saved["editor"]} if begun else None
        self._reopened, self._open = saved.get("open", 0), 0

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> EditStream:
        """Refuse: a checkpoint holds edits, not a model, and Lightning's way of reading it unpickles.

        Raises:
            MisconfigurationException: Always; it says what to do.
        """
        raise MisconfigurationException(
            "a checkpoint of an edit stream holds its edits, not the model: give it to Trainer.fit, validate or test "
            "as ckpt_path, or take the edited model of a run with lit-edit export"
        )

    # ---- taking the model away ----------------------------------------------------------------------------------

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
        model, state = self.model, None
        if self.adapter.sharded:
            state = gather_weights(model, keep=self.ranks.leads)

        def work() -> Payload:
            name = self.language_model.name
            return str(export_model(model, self.tokenizer, self.ledger, Path(folder), name, state)), {}

        return Path(self.ranks.lead(work, (ExportError,))[0])
