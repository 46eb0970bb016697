"""EditStream: a stream of edits as a LightningModule. It decides the order of calls; formulas live elsewhere."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_edit.data.datamodule import EditBatch, StreamLoader
from lit_edit.data.request import EditRequest
from lit_edit.editors.base import Editor, EditorInfo, Proposal
from lit_edit.editors.closed_form.d4s import D4S
from lit_edit.files.interrupts import deferred_interrupts
from lit_edit.files.paths import expand
from lit_edit.ledger.journal import Journal
from lit_edit.ledger.left_out import left_out
from lit_edit.ledger.ownership import Changed
from lit_edit.ledger.shared_journal import SharedJournal
from lit_edit.metrics.evaluation import Summary, flatten
from lit_edit.models.language_model import LanguageModel
from lit_edit.stats.second_moment import KeyStatistics
from lit_edit.stream.checkpoints import SavedStream
from lit_edit.stream.conflicts import ConflictPolicy
from lit_edit.stream.position import dealt_with
from lit_edit.stream.session import EditSession, RefusalPolicy

log = logging.getLogger(__name__)


class EditStream(SavedStream):
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
        changed: What to do about a model that holds edits of another stream or session, or was exported with some:
            ``refuse`` it, ``adopt`` its weights as the original ones, or ``restore`` what they were before.

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
        changed: Changed = "refuse",
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("on_conflict", on_conflict, ("replace", "average", "refuse")),
            ("on_refused", on_refused, ("stop", "skip")),
            ("changed", changed, ("refuse", "adopt", "restore")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        self.automatic_optimization = False
        self.language_model = LanguageModel(language_model) if isinstance(language_model, str) else language_model
        self.editor = D4S() if editor is None else editor
        self.statistics = statistics
        self.measure_each = measure_each
        self.on_conflict, self.on_refused, self.journal, self.changed = on_conflict, on_refused, journal, changed
        self._prepared = False
        self._measured_at: tuple[int, ...] | None = None  # the edits that held when the end was measured

    def on_fit_start(self) -> None:
        """Bring the ledger to the model's device and type, and hide Lightning's advice that does not apply."""
        self._align()
        self._attach_journal()
        for message in (".*does not have many workers.*", ".*is in eval mode.*", ".*module.s. in eval mode.*"):
            warnings.filterwarnings("ignore", message)

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
        missing = [r for r in [*requests, *self.committed_requests()] if r.id not in self.results["base"]]
        if missing:
            self.status("measuring the unedited model")
            results, _ = self.measure(missing, self.ledger.original(), with_perplexity=False)
            self.results["base"] |= results
        if "base" not in self.perplexities:
            self.perplexities["base"] = self._perplexity(self.ledger.original())
        if not self.edits_made:
            unedited = self.summary_of("base", [*self.committed_requests(), *requests])
            self.log_at_edit(flatten(unedited, "base"), 0)  # also where edits were carried over

    def _take_up(self) -> None:
        """Open the journal, prepare the editor, and begin a stream or go on where an earlier process left it."""
        self._attach_journal()
        self.session.pin_kernels()
        self._prepare_editor()
        self.session.begin(left_out=self._skipped())

    def _attach_journal(self) -> None:
        if self.journal is not None and self.ledger.journal.path is None:
            path = expand(self.journal)
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
                self.session.refuse(proposal.requests, "declined by apply_edit", "declined")
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
            "left_out": left_out(self.ledger.journal.records),
            **{stage: {**self.extra.get(stage, {}), **found} for stage, found in stages.items()},
            "perplexity": self.perplexities,
            "seconds": seconds,
            "layers": self.ledger.layer_norms(),
        }

    def on_fit_end(self) -> None:
        """Measure the finished stream, if no callback has asked for it before."""
        self.finish()

    def _skipped(self) -> Sequence[tuple[str, str]]:
        """Return place and fault of the records that the reader left out."""
        if self._trainer is None:  # edited without one
            return ()
        return getattr(getattr(self._trainer, "datamodule", None), "skipped", ())

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
        return dealt_with(self.ledger.history, requests, self._loader().batch_size)
