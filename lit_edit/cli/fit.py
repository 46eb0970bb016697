"""``fit``, ``validate`` and ``test``: an edit stream under Lightning."""

from __future__ import annotations

import sys
import warnings

from lightning.pytorch.cli import LightningCLI

from lit_edit.console.configs import expand_arguments, trains_network
from lit_edit.console.edit_cli import TRAINER_DEFAULTS, EditCLI
from lit_edit.console.messages import quieten
from lit_edit.data.datamodule import EditDataModule
from lit_edit.errors import ArgumentError
from lit_edit.runs.saved_config import SaveRunConfig
from lit_edit.stream.edit_stream import EditStream


def run_fit(args: list[str]) -> None:
    """Edit a model."""
    run_training("fit", args)


def run_validate(args: list[str]) -> None:
    """Measure without editing."""
    run_training("validate", args)


def run_test(args: list[str]) -> None:
    """Measure under Lightning's test loop."""
    run_training("test", args)


def run_training(command: str, args: list[str]) -> None:
    """Parse arguments, set the run folder up, and run one of Lightning's commands."""
    asks = any(a in ("-h", "--help") or a.startswith(("--help=", "--print_config")) for a in args)
    named = any(a in ("-c", "--config") or a.startswith(("--config=", "-c=")) for a in args)
    if command == "fit" and not named and not asks:
        args = ["--config", "quickstart", *args]
    quieten()
    if trains_network(args):
        from lit_edit.cli.train import run_network_training

        if command != "fit":
            raise ArgumentError(f"lit-edit {command} measures an edit stream; a network is trained: lit-edit fit")
        run_network_training(args)
        return

    class CLI(EditCLI):
        """Builds the parser of the wanted command only: the others take as long and are not looked at."""

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {command: LightningCLI.subcommands()[command]}

    words = [command, *expand_arguments(args)]
    # What Lightning starts the processes of the other devices with, from here. It warns when both carry arguments.
    argv, sys.argv = sys.argv, [sys.argv[0], command, *args]
    warnings.filterwarnings("ignore", ".*LightningCLI's args parameter.*")
    try:
        CLI(
            EditStream,
            EditDataModule,
            args=words,
            parser_kwargs={
                "parser_mode": "omegaconf",
                "exit_on_error": False,
                command: {"exit_on_error": False},
            },
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=SaveRunConfig if command == "fit" else None,
            save_config_kwargs={"overwrite": True},
        )
    finally:
        sys.argv = argv
