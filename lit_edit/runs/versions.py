"""Which versions a run was made with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("lit-edit", "torch", "transformers", "lightning", "torchmetrics", "tokenizers", "safetensors", "wandb")


def versions() -> dict[str, str]:
    """Return Python, the system and the packages that bear on a run's numbers; what is not installed is left out.

    Example:
        >>> {"python", "system", "torch"} <= set(versions())
        True
    """
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
