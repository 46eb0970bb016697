"""What is written while a command runs: messages above the progress bars, and one object for programs at the end."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

ALL_NOTES, WARNINGS = logging.INFO, logging.WARNING


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


def show_messages(level: int = ALL_NOTES) -> None:
    """Show log messages and warnings, those of libraries too, so that none shares a line with a progress bar.

    Args:
        level: Of our own messages; libraries are heard from warnings on.
    """
    above = AboveBars()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[above])
    logging.getLogger("lit_edit").setLevel(level)
    if above not in logging.root.handlers:  # whoever has set logging up, as a program that calls us, keeps it
        return
    logging.captureWarnings(True)
    for known in logging.root.manager.loggerDict.values():
        for handler in known.handlers if isinstance(known, logging.Logger) else ():
            if type(handler) is logging.StreamHandler and handler.stream in (sys.stderr, sys.stdout):
                known.removeHandler(handler)
                own = AboveBars(handler.level)
                own.setFormatter(handler.formatter)
                known.addHandler(own)


def write_json(value: Any) -> None:
    """Write a value for programs to standard output."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
