"""``lit-edit fit --config train/NAME``: train the network of an editor.

A config of this kind has ``train: network`` at its top. Then ``model`` and ``data`` name classes of their own
(``class_path``): an ordinary LightningModule with an ordinary optimizer, and its data. Everything else is as for an
edit stream: names instead of paths, overrides, a run folder with ``config.yaml``, ``metrics.csv``, ``checkpoints``. At
the end the network, as it was at its best checkpoint, is in ``network.safetensors``, which the editor takes.

The module says what that file holds: it has a method ``save_network(path: Path) -> None``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from lit_edit.console.configs import expand_arguments, explain
from lit_edit.errors import ArgumentError, UserError
from lit_edit.files.trees import load_tree
from lit_edit.runs.files import run_lock
from lit_edit.runs.names import check_run_name
from lit_edit.runs.saved_config import SaveRunConfig
from lit_edit.stream.checkpoint_io import AtomicCheckpointIO

NETWORK = "network.safetensors"
"""The file of a run folder that holds what was trained."""

NETWORK_DEFAULTS: dict[str, Any] = {
    "accelerator": "auto",
    "devices": 1,
    "max_epochs": 1,
    "logger": {"class_path": "lit_edit.loggers.RunCSVLogger"},
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}


def run_network_training(args: list[str]) -> None:
    """Train a network as the arguments of ``lit-edit fit`` say.

    Raises:
        ArgumentError: If they cannot be right.
    """
    NetworkCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        args=["fit", *expand_arguments(args)],
        parser_kwargs={"parser_mode": "omegaconf", "exit_on_error": False, "fit": {"exit_on_error": False}},
        trainer_defaults=NETWORK_DEFAULTS,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        save_config_callback=SaveRunConfig,
        save_config_kwargs={"overwrite": True},
        load_from_checkpoint_support=False,
    )


class NetworkCLI(LightningCLI):
    """LightningCLI with run folders, for the training of networks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        argv, sys.argv = sys.argv, [sys.argv[0]]  # LightningCLI warns when both carry arguments
        try:
            with ExitStack() as self._lock:  # the folder's, until the run is over
                super().__init__(*args, **kwargs)
        finally:
            sys.argv = argv

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return what there is: ``fit`` alone."""
        return {"fit": LightningCLI.subcommands()["fit"]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that say where a run is kept."""
        parser.add_argument("--train", type=str, default="network", help="Says that a network is trained here.")
        parser.add_argument("--run_name", type=str | None, default=None, help="Name of the run; by default the time.")
        parser.add_argument("--runs_dir", type=str, default="runs", help="Folder in which run folders are made.")
        parser.add_argument(
            "--resume",
            type=Literal["never", "auto"],
            default="never",
            help="auto: go on where an earlier run of this name was cut; begin where there is none; do nothing where "
            "it has come to its end.",
        )
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="Delete an earlier run of the same name instead of refusing."
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and say in a line what cannot be right."""
        try:
            super().parse_arguments(parser, args)
        except (argparse.ArgumentError, OmegaConfBaseException, KeyError) as error:
            raise ArgumentError(
                f"{explain(str(error))} (lit-edit fit --config train/NAME --help lists all settings)"
            ) from None

    def before_instantiate_classes(self) -> None:
        """Point everything that writes at the run folder."""
        config = self.config["fit"]
        name = config.run_name or datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        check_run_name(name)
        self.run_folder = Path(config.runs_dir).expanduser().resolve() / name
        config.trainer.default_root_dir = str(self.run_folder)
        if config.resume == "auto" and not config.get("ckpt_path"):
            if (self.run_folder / NETWORK).is_file():
                sys.stdout.write(f"{self.run_folder} has come to its end already: see {NETWORK} there\n")
                raise SystemExit(0)
            last = self.run_folder / "checkpoints" / "last.ckpt"
            if last.is_file():
                config.ckpt_path = str(last)
        loggers = config.trainer.logger if isinstance(config.trainer.logger, list) else [config.trainer.logger]
        for logger in loggers:
            if hasattr(logger, "class_path"):
                logger.init_args["save_dir"] = str(self.run_folder)
        for callback in config.trainer.callbacks or []:
            if callback.class_path.endswith("ModelCheckpoint"):
                callback.init_args["dirpath"] = str(self.run_folder / "checkpoints")

    def instantiate_classes(self) -> None:
        """Instantiate, and turn what constructors say of bad values into an error for the user."""
        try:
            super().instantiate_classes()
        except UserError:
            raise
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise ArgumentError(explain(str(error))) from error
        if not callable(getattr(self.model, "save_network", None)):
            raise ArgumentError(
                f"{type(self.model).__name__} says not what its network is: it needs a method save_network(path)"
            )

    def before_fit(self) -> None:
        """Make the run folder."""
        config, folder = self.config["fit"], self.run_folder
        left = [path for path in folder.iterdir() if path.name != ".lock"] if folder.is_dir() else []
        if left and not config.get("ckpt_path"):
            if not config.overwrite and config.resume != "auto":
                raise ArgumentError(
                    f"the run folder {folder} exists; choose another --run_name, or delete it with --overwrite true"
                )
            if not (folder / "config.yaml").is_file():
                raise ArgumentError(f"{folder} is not a run folder (it has no config.yaml); it is not deleted")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArgumentError(f"the run folder {folder} cannot be made: {error.strerror}") from error
        self._lock.enter_context(run_lock(folder))
        if not config.get("ckpt_path"):
            for path in left:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()  # no pickle
        config.overwrite = False  # not for whoever starts again from the run's config.yaml

    def after_fit(self) -> None:
        """Keep the network as it was at its best, and say where it is."""
        trainer: Trainer = self.trainer
        if not trainer.is_global_zero:
            return
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        if best:
            network = self.model  # what is trained, no language model
            network.load_state_dict(load_tree(best)["state_dict"])
        path = self.run_folder / NETWORK
        self.model.save_network(path)
        cwd = Path.cwd()
        shown = path.relative_to(cwd) if path.is_relative_to(cwd) else path
        measured = ", ".join(
            f"{name} {float(value):.3f}" for name, value in trainer.callback_metrics.items() if name.startswith("val/")
        )
        sys.stdout.write(f"\nThe network is in {shown}{f' ({measured} at the end)' if measured else ''}.\n")
