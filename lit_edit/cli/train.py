"""``lit-edit fit --config train/NAME``: train the network of an editor.

A config of this kind has ``train: network`` at its top. Then ``model`` and ``data`` name classes of their own
(``class_path``): an ordinary LightningModule with an ordinary optimizer, and its data. Everything else is as for an
edit stream: names instead of paths, overrides, a run folder with ``config.yaml``, ``metrics.csv``, ``checkpoints``. At
the end the network, as it was at its best checkpoint, is in ``network.safetensors``, which the editor takes.

The module says what that file holds: it has a method ``save_network(path: Path) -> None``.
"""

from __future__ import annotations

import sys

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser

from lit_edit.console.run_cli import RunCLI, time_stamp
from lit_edit.console.words import expand_arguments
from lit_edit.errors import ArgumentError
from lit_edit.files.paths import expand
from lit_edit.files.trees import load_tree
from lit_edit.runs.names import check_run_name, shown
from lit_edit.runs.resuming import check_settings, newest_whole
from lit_edit.runs.saved_config import SaveRunConfig
from lit_edit.stream.checkpoint_io import AtomicCheckpointIO

NETWORK = "network.safetensors"
"""The file of a run folder that holds what was trained."""
_DECIDING = ("seed_everything", "model", "data")


def run_network_training(args: list[str]) -> None:
    """Train a network as the arguments of ``lit-edit fit`` say."""
    NetworkCLI(
        (LightningModule, LightningDataModule),
        "fit",
        expand_arguments(args),
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SaveRunConfig,
    )


class NetworkCLI(RunCLI):
    """The command line of the training of a network."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that say where a run is kept, and that it is one of these."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--train", type=str, default="network", help="Says that a network is trained here.")

    def before_instantiate_classes(self) -> None:
        """Point everything that writes at the run folder."""
        config = self.config["fit"]
        name = config.run_name or time_stamp()
        check_run_name(name)
        self.run_folder = expand(config.runs_dir).resolve() / name
        if config.resume == "auto" and not config.get("ckpt_path"):
            if (self.run_folder / "config.yaml").is_file():
                check_settings(self.run_folder, self._parser("fit").dump(config, skip_none=False), _DECIDING)
            if (self.run_folder / NETWORK).is_file():
                sys.stdout.write(f"{self.run_folder} has come to its end already: see {NETWORK} there\n")
                raise SystemExit(0)
            if (found := newest_whole(self.run_folder / "checkpoints")) is not None:
                config.ckpt_path = str(found)
        self.point_writers(self.run_folder)

    def instantiate_classes(self) -> None:
        """Instantiate, and check that the network can be kept."""
        super().instantiate_classes()
        if not callable(getattr(self.model, "save_network", None)):
            raise ArgumentError(
                f"{type(self.model).__name__} says not what its network is: it needs a method save_network(path)"
            )

    def before_fit(self) -> None:
        """Make the run folder."""
        config = self.config["fit"]
        self.begin_run(bool(config.get("ckpt_path")), config.overwrite or config.resume == "auto")
        self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()  # no pickle

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
        measured = ", ".join(
            f"{name} {float(value):.3f}" for name, value in trainer.callback_metrics.items() if name.startswith("val/")
        )
        sys.stdout.write(f"\nThe network is in {shown(path)}{f' ({measured} at the end)' if measured else ''}.\n")
