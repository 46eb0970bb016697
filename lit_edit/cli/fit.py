"""``fit``, ``validate`` and ``test``: an edit stream under Lightning."""

from __future__ import annotations

import warnings

from lit_edit.console.words import check_data, check_names, expand_arguments, trains_network, with_config
from lit_edit.errors import ArgumentError


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
    asks = any(a in ("-h", "--help") or a.startswith("--help=") for a in args)
    check_names(command, args)
    if command == "fit" and not asks:
        args = with_config(args)
    network = trains_network(args)
    if not asks and not any(word.replace("_", "-").startswith("--print-config") for word in args):
        check_data(args)
    if network and command != "fit":
        raise ArgumentError(f"lit-edit {command} measures an edit stream; a network is trained: lit-edit fit")

    # Only now what takes seconds to import: a slip of the pen is answered at once.
    from lit_edit.console.messages import quieten

    quieten()
    if network:
        from lit_edit.cli.train import run_network_training

        run_network_training(args)
        return

    from lit_edit.console.edit_cli import EditCLI
    from lit_edit.runs.saved_config import SaveRunConfig

    warnings.filterwarnings("ignore", ".*LightningCLI's args parameter.*")
    keep = {"save_config_callback": SaveRunConfig} if command == "fit" else {}
    EditCLI(command, expand_arguments(args), argv=[command, *args], **keep)
