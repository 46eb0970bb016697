"""What is written while a command runs: messages above the progress bars, and one object for programs at the end."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from lit_edit.files.paths import without_nan

_LIBRARIES = (
    "datasets", "huggingface_hub", "lightning", "lightning.fabric", "lightning.pytorch", "torchmetrics", "transformers",
)  # fmt: skip


class AboveBars(logging.Handler):
    """Writes each message to standard error on lines of its own, above the progress bars that are on the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message; the bars are drawn again below it."""
        try:
            text = self.format(record).rstrip("\n")
            bars = sys.modules.get("tqdm")  # where it was never loaded there is no bar
            if bars is None:
                sys.stderr.write(f"{text}\n")
            else:
                bars.tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def show_messages(level: int = logging.INFO) -> None:
    """Show log messages (our own from ``level`` on) and warnings, so that none shares a line with a progress bar.

    Where logging was set up before, by a program that calls us, it is left as it is. To be called again when libraries
    have been imported that bring handlers of their own.
    """
    if not logging.root.handlers:
        logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[AboveBars()])
    logging.getLogger("lit_edit").setLevel(level)
    if not any(isinstance(handler, AboveBars) for handler in logging.root.handlers):
        return
    logging.captureWarnings(True)
    for name in _LIBRARIES:
        known = logging.getLogger(name)
        for handler in [handler for handler in known.handlers if type(handler) is logging.StreamHandler]:
            known.removeHandler(handler)
            known.propagate = True


def write_json(value: Any) -> None:
    """Write a value for programs to standard output; what is not finite is ``null``."""
    sys.stdout.write(json.dumps(without_nan(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
