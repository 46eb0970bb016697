"""Names of runs, and how their folders are shown."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lit_edit.errors import ArgumentError


def check_run_name(name: str) -> None:
    """Raise :class:`ArgumentError` unless a run's name can be that of a folder beside others."""
    if not re.fullmatch(r"[\w.+=@-]+", name) or name.strip(".") == "":
        raise ArgumentError(f"--run_name {name!r} must be a plain folder name (letters, digits, and . _ + = @ -)")


def shown(folder: Path) -> str:
    """Return a folder as a person would write it here."""
    return os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder)
