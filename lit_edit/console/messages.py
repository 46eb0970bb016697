"""What a person reads of all that is said while a command runs."""

from __future__ import annotations

import logging
import warnings

from lit_edit.console.processes import leads
from lit_edit.console.terminal import show_messages


def quieten(quiet: bool = False) -> None:
    """Show our own notes; keep Lightning's tips, which are about other kinds of training, to themselves.

    If ``quiet``, show warnings and errors only of our own.
    """
    own = logging.WARNING if quiet else logging.INFO
    show_messages(own if leads() else logging.ERROR)  # one of them speaks for all
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*configure_optimizers. returned .None.*",
        ".*will run with no optimizer.*",
        ".*manual optimization.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*is in eval mode.*",
        ".*in eval mode at the start.*",
        ".*val_dataloader.*",
        ".*validation_step.*",
        ".*resum.*mid-epoch.*",
        ".*GPU available but not used.*",
        ".*The `srun` command is available.*",  # on a cluster's own machines
        ".*The dirpath has changed from.*",
        ".*LeafSpec.*",
        ".*Total length of .list. across ranks is zero.*",
        ".*You have overridden .transfer_batch_to_device.*",
        ".*callbacks used to create the checkpoint need to be provided.*",
    ):
        warnings.filterwarnings("ignore", message)
