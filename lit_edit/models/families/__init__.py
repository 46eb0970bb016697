"""One small file per architecture family, found by its being here; nothing else knows a module path."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from lit_edit.models.spec import ArchSpec

SPECS: tuple[ArchSpec, ...] = tuple(
    import_module(f"{__name__}.{module.name}").SPEC for module in iter_modules(__path__)
)

__all__ = ["SPECS"]
