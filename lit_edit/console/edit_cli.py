"""``fit``, ``validate`` and ``test`` of an edit stream: where a run is kept, how it goes on, what is said of it."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers.utils.logging import disable_progress_bar

from lit_edit.callbacks import ClosingTable, ReplicaCheck, ReplicaError, StopOnSignal, StoppedBySignal
from lit_edit.console.configs import changed_settings, check_settings
from lit_edit.console.launching import WatchingLauncher
from lit_edit.console.messages import quieten
from lit_edit.console.processes import (
    Decision,
    check_launched,
    forget_decision,
    handed_down,
    job_name,
    leads,
    share_decision,
    started_together,
)
from lit_edit.console.run_cli import TRAINER_DEFAULTS, RunCLI, time_stamp
from lit_edit.console.terminal import write_json
from lit_edit.data.datamodule import EditDataModule
from lit_edit.devices.ranks import RankError
from lit_edit.errors import ArgumentError, RunStoppedError, UserError, counted
from lit_edit.files.paths import expand
from lit_edit.files.trees import CheckpointError, load_tree
from lit_edit.runs.continuing import carry_over, check_source
from lit_edit.runs.files import journal_path
from lit_edit.runs.folder import find_checkpoint
from lit_edit.runs.names import check_run_name, shown
from lit_edit.runs.reading import find_folder, has_ended, read_outcome
from lit_edit.runs.resuming import (
    adopt_journal,
    check_same,
    find_run,
    mend_journal,
    remove_parts,
    run_of_config,
    warn_if_behind,
)
from lit_edit.runs.resuming import check_settings as check_settings_of_run
from lit_edit.stream.edit_stream import EditStream

log = logging.getLogger(__name__)


STREAM_DEFAULTS = TRAINER_DEFAULTS | {
    "max_epochs": 1,  # a run is one pass over the stream
    "use_distributed_sampler": False,  # a sampler would split the stream
}


class EditCLI(RunCLI):
    """The command line of an edit stream: ``fit``, ``validate`` or ``test``, with its arguments."""

    def __init__(self, command: str, words: Sequence[str] = (), **more: Any) -> None:
        self._ended = False
        super().__init__((EditStream, EditDataModule), command, words, trainer_defaults=STREAM_DEFAULTS, **more)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that say where a run is kept, and what it begins with."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--continue",
            type=str | None,
            default=None,
            help="Folder of an earlier run whose edits this one begins with: the same model, edited further.",
        )
        parser.add_argument(
            "--quiet", action="store_true", help="No bars, no tables: warnings, errors, and the folder at the end."
        )
        parser.add_argument(
            "--json", action="store_true", help="The same, and all that is on standard output is one JSON object."
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and say in a line what cannot be right."""
        super().parse_arguments(parser, args)
        check_settings(self.config[self.config.subcommand])

    def before_instantiate_classes(self) -> None:
        """Point everything that writes at the run folder."""
        config = self.config[self.subcommand]
        self.as_json, self.quiet = config.pop("json"), config.pop("quiet")  # of this process, not of the run
        self.quiet = self.quiet or self.as_json
        quieten(self.quiet)
        trainer = config.trainer
        if trainer.callbacks is not None and not isinstance(trainer.callbacks, list):
            trainer.callbacks = [trainer.callbacks]
        if trainer.enable_progress_bar is False:
            trainer.callbacks = [c for c in trainer.callbacks or [] if not c.class_path.endswith("ProgressBar")]
        _make_absolute((config.model.editor or {}).get("init_args"))
        if self.subcommand == "fit" and config["continue"]:
            config["continue"] = str(find_folder(Path(config["continue"])))
        folder = self._run_folder(config)  # found by settings as they are kept
        self.run_folder = folder
        if self.subcommand == "fit" and leads():
            self._enter(folder)
        self.point_writers(folder)

    def _parse_ckpt_path(self) -> None:
        """Check a checkpoint before anything is built on it (Lightning looks for hyper-parameters, we keep none)."""
        checkpoint = self.config[self.config.subcommand].get("ckpt_path")
        if checkpoint is not None:
            check_checkpoint(Path(checkpoint))

    def fit(self, **kwargs: Any) -> None:
        """Fit, and say how to go on when the user interrupts."""
        decided = Decision(str(self.run_folder), kwargs.get("ckpt_path"), self._ended)
        decided = share_decision(self.trainer, self.model, decided)
        if decided.ended:
            raise SystemExit(0)
        kwargs["ckpt_path"] = decided.checkpoint
        self._watch_children()
        self.model.journal = str(journal_path(Path(decided.folder)))
        try:
            self.trainer.fit(**kwargs)
        except StoppedBySignal as stopped:
            if leads():
                sys.stderr.write(f"\nlit-edit: stopped; it goes on with\n  {self._go_on()}\n")
            raise SystemExit(stopped.code) from None
        except (RankError, ReplicaError) as error:
            raise RunStoppedError(f"{error}. Nothing that was made is lost; go on with\n  {self._go_on()}") from error
        except (KeyboardInterrupt, SystemExit):
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C is not to cut the way out
            if not leads():
                raise SystemExit(130) from None
            hint = f"go on with\n  {self._go_on()}\n"
            begun = (self.run_folder / "config.yaml").is_file()
            sys.stderr.write(f"\nlit-edit: interrupted; {hint if begun else 'nothing was saved yet'}\n")
            raise SystemExit(130) from None
        finally:
            forget_decision()
        if self.model.is_at_end:
            self.model.ledger.note({"kind": "end"})

    def _watch_children(self) -> None:
        """Put a launcher in the place of Lightning's that says which process has ended, and gives this one time."""
        strategy: Any = self.trainer.strategy
        if isinstance(strategy.launcher, _SubprocessScriptLauncher):
            environment = strategy.cluster_environment
            strategy._launcher = WatchingLauncher(
                environment, strategy.num_processes, strategy.num_nodes, self._go_on()
            )

    def _go_on(self) -> str:
        return f"lit-edit fit --config {self.run_folder}/config.yaml --resume auto"

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer, and name the settings that it was given where it cannot be."""
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except UserError:
            raise
        except (MisconfigurationException, ValueError, TypeError, ImportError, RuntimeError) as error:
            given = changed_settings(self.config[self.subcommand].trainer, STREAM_DEFAULTS)
            together = "; several processes were started: set both to what was started" if started_together() else ""
            raise ArgumentError(f"{error} (the Trainer was given {given}){together}") from error
        check_launched(trainer)
        if self.quiet:
            _silence(trainer)
        if self.subcommand == "fit" and (trainer.world_size > 1 or SLURMEnvironment.detect()):
            callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
            present = {type(callback) for callback in callbacks}
            callbacks += [c for c in (ReplicaCheck(), StopOnSignal()) if type(c) not in present]
        return trainer

    def before_fit(self) -> None:
        """Read the data before the model is loaded: a broken line should not cost a minute."""
        self.datamodule.read()
        if not leads() or self._ended:
            return
        source = self.config["fit"]["continue"]
        if source:  # before anything is deleted or made
            check_source(Path(source), self.run_folder, overwrite=self.config["fit"].overwrite)
        goes_on = bool(self.config["fit"].get("ckpt_path")) or self.config["fit"].resume == "auto"
        if self.begin_run(goes_on, self.config["fit"].overwrite):
            self._lock.push(self._tidy)  # behind the lock: where another process was faster the folder is not ours
        if checkpoint := self.config["fit"].get("ckpt_path"):
            adopt_journal(Path(checkpoint), self.run_folder)
        if source and not journal_path(self.run_folder).is_file():
            edits = carry_over(Path(source), self.run_folder)
            log.info("beginning with the %d edits of %s", edits, source)

    def before_validate(self) -> None:
        """Read the data before the model is loaded."""
        self.datamodule.read()
        if checkpoint := self.config[self.subcommand].get("ckpt_path"):
            warn_if_behind(Path(checkpoint))

    before_test = before_validate

    def after_fit(self) -> None:
        """Say where the results are."""
        if not leads():
            return
        if self.quiet:
            self._write_outcome()
            return
        where = shown(self.run_folder)
        page = "; look at report.html there" if (self.run_folder / "report.html").is_file() else ""
        sys.stdout.write(
            f"\nEverything is in {where}/{page}. Try:\n"
            f'  lit-edit ask --run {where} "{self.datamodule.requests[0].text}"\n'
        )
        if self.model.ledger.layers:  # else the edits are not in the weights
            sys.stdout.write(f"  lit-edit export --run {where} --out my-edited-model\n")

    def _write_outcome(self) -> None:
        where = shown(self.run_folder)
        if self.as_json:
            write_json({**read_outcome(self.run_folder), "run": where})
        else:
            sys.stdout.write(f"{where}\n")

    def after_validate(self) -> None:
        """Print what was measured."""
        from rich.console import Console

        from lit_edit.console.tables import table_of

        if not leads():
            return
        edits = len(self.model.ledger)
        measured = {n: float(value) for n, value in self.trainer.callback_metrics.items() if "/" in n}  # not the step
        facts = len(self.datamodule.requests)
        if self.as_json:
            write_json({"facts": facts, "edits": edits, **measured})
            return
        rows = [(name.partition("/")[2].replace("/", " "), f"{value:.3f}") for name, value in measured.items()]
        title = f"{counted(facts, 'fact')} on a model with {counted(edits, 'edit')}"
        Console().print(table_of(("metric", ">value"), rows, title=title))

    after_test = after_validate

    def _run_folder(self, config: Any) -> Path:
        if (told := handed_down()) is not None:
            return Path(told.folder)
        name, checkpoint = job_name() if config.run_name is None else config.run_name, config.get("ckpt_path")
        if checkpoint and self.subcommand == "fit" and Path(checkpoint).resolve().parent.name == "checkpoints":
            folder = Path(checkpoint).resolve().parent.parent
            if name in (None, folder.name):
                return folder  # resumed where it was, from whatever folder
        runs = expand(config.runs_dir).resolve()
        if self.subcommand == "fit" and config.resume == "auto":
            own = run_of_config(config.get("config") or [])
            if own is not None and (name is None or (name == own.name and not journal_path(runs / name).is_file())):
                return own  # also from another folder than the run was started in
            settings = self._parser("fit").dump(config, skip_none=False)
            if name is None and (found := find_run(runs, settings)) is not None:
                return found
        if name is None:
            stamp = time_stamp()
            name = stamp if self.subcommand == "fit" else f"{stamp}_{self.subcommand}"
        check_run_name(name)
        return runs / name

    def _enter(self, folder: Path) -> None:
        """Keep other processes out of the run folder, and find out where to go on."""
        config = self.config["fit"]
        if not folder.is_dir():
            return
        self.lock_out_others()
        remove_parts(folder)
        if config.resume == "auto" and not config.get("ckpt_path"):
            mend_journal(folder)
            settings = self._parser("fit").dump(config, skip_none=False)
            check_settings_of_run(folder, settings, ["seed_everything"])
            if has_ended(folder) and self._nothing_left(folder, settings):
                where = shown(folder)
                if self.quiet:
                    self._write_outcome()
                else:
                    sys.stdout.write(f"{where} has come to its end already: see {where}/summary.json\n")
                self._ended = True
                if not started_together():
                    raise SystemExit(0)
                return  # the other processes are waiting to be told
            if (found := find_checkpoint(folder)) is not None:
                config.ckpt_path = str(found)

    def _nothing_left(self, folder: Path, settings: str) -> bool:
        """Tell whether a run that has ended has all data that are asked for; refuse whatever else differs."""
        config = self.config["fit"]
        if config["continue"]:
            check_source(Path(config["continue"]), folder)
        return check_same(folder, settings)

    def _tidy(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Take a new run's folder away if the run has failed before its first edit: nothing is in it to go on with."""
        if isinstance(error, Exception) and not getattr(self.model, "edits_made", 0):
            shutil.rmtree(self.run_folder, ignore_errors=True)


def check_checkpoint(path: Path) -> None:
    """Raise :class:`ArgumentError` unless ``path`` is a checkpoint of an edit stream."""
    if not os.path.isfile(path):
        raise ArgumentError(f"--ckpt_path {path}: no such file")
    try:
        saved = load_tree(path, "meta")
    except CheckpointError as error:
        raise ArgumentError(f"--ckpt_path {error}") from None
    if not isinstance(saved, dict) or "lit_edit" not in saved:
        raise ArgumentError(f"--ckpt_path {path}: not a checkpoint of lit-edit")


def _silence(trainer: Trainer) -> None:
    """Take away what draws and writes to the screen while a stream runs, and at its end."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, ProgressBar):
            callback.disable()
    callbacks[:] = [callback for callback in callbacks if not isinstance(callback, ClosingTable)]
    disable_progress_bar()


def _make_absolute(editor: Any) -> None:
    """Name the files that an editor's settings name in full: undo and ask may be called from another folder."""
    for name in ("network", "demonstration_path"):
        value = None if editor is None else editor.get(name)
        if isinstance(value, str) and os.path.exists(os.path.expanduser(value)):
            editor[name] = str(expand(value).resolve())
