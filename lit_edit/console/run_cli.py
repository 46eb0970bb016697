"""LightningCLI with run folders: what editing a model and training an editor's network have in common."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch
from jsonargparse import ActionConfigFile
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from lit_edit.console.arguments import SHORT, no_such_option
from lit_edit.console.configs import explain
from lit_edit.console.fit_help import SettingsParser, describe
from lit_edit.console.meant import with_meant
from lit_edit.errors import ArgumentError, UserError
from lit_edit.files.extras import import_extra
from lit_edit.runs.files import run_lock

TRAINER_DEFAULTS: dict[str, Any] = {
    "accelerator": "auto",
    "devices": 1,
    "max_epochs": 1,
    "logger": {"class_path": "lit_edit.loggers.RunCSVLogger"},
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}


ABOUT = {
    "fit": "Make the edits of a stream one after another, measure them, and keep everything in a run folder.",
    "validate": "Measure the edits of a stream on a model or a checkpoint, without editing.",
    "test": "Measure the edits of a stream under Lightning's test loop, without editing.",
}
"""What each command does, for its help."""


@contextmanager
def argv_of(words: Sequence[str]) -> Iterator[None]:
    """Let ``sys.argv`` be others: Lightning starts the processes of other devices with it, and warns of two."""
    before, sys.argv = sys.argv, [sys.argv[0], *words]
    try:
        yield
    finally:
        sys.argv = before


class RunCLI(LightningCLI):
    """LightningCLI of one command, with run folders.

    The parser of no other command is built: each takes as long, and none is looked at. ``words`` are as
    :func:`~lit_edit.console.words.expand_arguments` returns them; processes of other devices are started with ``argv``.
    """

    run_folder: Path

    def __init__(
        self, kind: tuple[type, type], command: str, words: Sequence[str] = (), argv: Sequence[str] = (), **more: Any
    ) -> None:
        self._command, self._words, self._locked = command, list(words), False
        # They are about Lightning's calls, not the user's.
        os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        settings: dict[str, Any] = {
            "parser_kwargs": {"parser_mode": "omegaconf", "exit_on_error": False, command: {"exit_on_error": False}},
            "trainer_defaults": TRAINER_DEFAULTS,
            "seed_everything_default": 0,
            "auto_configure_optimizers": False,
            "save_config_callback": None,
            "save_config_kwargs": {"overwrite": True},
            "load_from_checkpoint_support": False,
        }
        with argv_of(argv), ExitStack() as self._lock:  # the folder's, until the run is over
            super().__init__(*kind, args=[command, *words], **(settings | more))

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser whose help begins with what one needs."""
        kwargs.setdefault("dump_header", [f"lightning.pytorch=={lightning.pytorch.__version__}"])
        parser = SettingsParser(**kwargs)
        parser.chosen = self._words
        text = "A YAML file, or the name of a config that ships (lit-edit models lists them); several."
        parser.add_argument("-c", "--config", action=ActionConfigFile, help=text)
        return parser

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override] # Lightning asks its instances alone
        """Return the one that there is."""
        return {self._command: LightningCLI.subcommands()[self._command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that say where a run is kept."""
        parser.add_argument("--run_name", type=str | None, default=None, help="Name of the run; by default the time.")
        parser.add_argument("--runs_dir", type=str, default="runs", help="Folder in which run folders are made.")
        parser.add_argument(
            "--resume",
            type=Literal["never", "auto"],
            default="never",
            help="auto: go on where an earlier run of this name (or, without a name, of this config) was cut; begin "
            "where there is none; do nothing where it has come to its end.",
        )
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="Delete an earlier run of the same name instead of refusing."
        )
        describe(parser, self._command, ABOUT[self._command])

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and say in a line what cannot be right."""
        try:
            super().parse_arguments(parser, args)
        except (argparse.ArgumentError, OmegaConfBaseException, KeyError) as error:
            unknown = [word.partition("=")[0] for word in args if f" {word.partition('=')[0]}" in str(error)]
            told = with_meant(explain(str(error)), self._known())
            told = no_such_option(unknown[0], self._known()) if "nrecognized" in str(error) and unknown else told
            raise ArgumentError(f"{told} (lit-edit {args[0]} --help lists all settings)") from None
        loggers = self.config[self._command].trainer.logger
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            if str(getattr(logger, "class_path", "")).endswith(".TensorBoardLogger"):
                import_extra("tensorboard", "TensorBoardLogger (trainer.logger)")

    def _known(self) -> list[str]:
        return [*SHORT, *(name for name in self._parser(self._command)._option_string_actions if name[:2] == "--")]

    def point_writers(self, folder: Path) -> None:
        """Let everything that writes files write them into a run folder."""
        trainer = self.config[self._command].trainer
        trainer.default_root_dir = str(folder)
        for logger in trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]:
            if hasattr(logger, "class_path"):
                _point_logger(logger.class_path, logger.init_args, folder)
        for callback in trainer.callbacks or []:
            if callback.class_path.endswith("ModelCheckpoint"):
                where = callback.init_args.get("dirpath")
                # A config that another run has left behind names that run's folder.
                if where is None or (
                    Path(where).name == "checkpoints" and (Path(where).parent / "config.yaml").is_file()
                ):
                    callback.init_args["dirpath"] = str(folder / "checkpoints")

    def instantiate_classes(self) -> None:
        """Instantiate, and turn what constructors say of bad values into an error for the user."""
        try:
            super().instantiate_classes()
        except UserError:
            raise
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise ArgumentError(explain(str(error))) from error

    def lock_out_others(self) -> None:
        """Keep other processes out of the run folder until the run is over."""
        if not self._locked:
            self._lock.enter_context(run_lock(self.run_folder))
            self._locked = True

    def begin_run(self, goes_on: bool, overwrite: bool) -> bool:
        """Make the run folder, and return whether there was none; what is in it must be needed (``goes_on``) or go."""
        config, folder = self.config[self._command], self.run_folder
        left = [path for path in folder.iterdir() if path.name != ".lock"] if folder.is_dir() else []
        if left and not goes_on:
            if not overwrite:
                raise ArgumentError(
                    f"the run folder {folder} exists; go on where it was cut with --resume auto, choose another "
                    "--run_name, or delete the old run with --overwrite true"
                )
            if not (folder / "config.yaml").is_file():
                raise ArgumentError(f"{folder} is not a run folder (it has no config.yaml); it is not deleted")
            for path in left:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        config.overwrite = False  # not for whoever starts again from the run's config.yaml
        try:
            new = not folder.is_dir()
            folder.mkdir(parents=True, exist_ok=True)
            self.lock_out_others()
        except OSError as error:
            raise ArgumentError(f"the run folder {folder} cannot be made: {error.strerror}") from error
        return new


def time_stamp() -> str:
    """Return the name of a run that was given none."""
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def _point_logger(class_path: str, init_args: Any, folder: Path) -> None:
    kind = class_path.rpartition(".")[2]
    if kind in ("RunCSVLogger", "WandbLogger", "RunWandbLogger"):
        init_args["save_dir"] = str(folder)
    elif kind in ("TensorBoardLogger", "CSVLogger"):
        for name, value in (("save_dir", str(folder.parent)), ("name", folder.name), ("version", "")):
            init_args[name] = value
    if kind in ("WandbLogger", "RunWandbLogger"):
        init_args["name"] = init_args.get("name") or folder.name
        # Nothing leaves the machine unless the user says so.
        os.environ.setdefault("WANDB_MODE", "offline")
        os.environ.setdefault("WANDB_SILENT", "true")
