"""Where lit-edit keeps things, and how it writes files so that no reader ever sees half of one."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lit_edit.errors import UserError


def expand(name: str | Path) -> Path:
    """Return a path with ``~`` replaced by the home folder; nobody's is a :class:`UserError`."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise UserError(f"{name}: there is no such home folder") from None


def cache_dir() -> Path:
    """Return the cache folder: ``$LIT_EDIT_CACHE``, else ``$XDG_CACHE_HOME/lit-edit``, else ``~/.cache/lit-edit``."""
    if explicit := os.environ.get("LIT_EDIT_CACHE"):
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "lit-edit"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in place in one step.

    On any exception the old file stays and the temporary one is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def without_nan(value: Any, instead: Callable[[float], Any] = lambda _: None) -> Any:
    """Return plain data with something (``None``) in place of NaN and infinity, which JSON does not have.

    Example:
        >>> without_nan({"a": [1.0, float("nan")]})
        {'a': [1.0, None]}
    """
    if isinstance(value, Mapping):
        return {name: without_nan(part, instead) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(part, instead) for part in value]
    return instead(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Mapping[str, Any] | list[Any]) -> None:
    """Write strict JSON (no NaN), readable and atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json_lines(path: Path) -> list[Any]:
    """Return what each line of a file says; texts in it may hold other kinds of line breaks."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write a line of strict JSON for each row, atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """Write text, atomically."""
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))
