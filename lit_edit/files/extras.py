"""Packages that not everybody needs: by which extra of ``pip install`` they come, and one way to import them."""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType
from typing import Any

from lit_edit.errors import NotHereError

EXTRAS = MappingProxyType({"tensorboard": "tensorboard", "peft": "adapters", "lm_eval": "harness"})
"""By package: the extra that brings it."""


def import_extra(module: str, what: str) -> Any:
    """Return a module of a package that an extra brings.

    Args:
        module: Its full name.
        what: Who needs it, for the message.

    Raises:
        NotHereError: If it cannot be imported; names the extra and the command that installs it.
    """
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and str(error.name).partition(".")[0] == package
        raise NotHereError(
            f"{what} needs {package}{', which is not installed' if missing else f' ({error})'}: "
            f'pip install "lit-edit[{EXTRAS[package]}]"'
        ) from None
