"""Models: loading, and reading them layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_edit.files.lazy import lazily

if TYPE_CHECKING:
    from lit_edit.models.adapter import ModelAdapter
    from lit_edit.models.language_model import LanguageModel
    from lit_edit.models.packaged import ModelUnavailableError
    from lit_edit.models.spec import ArchSpec
    from lit_edit.models.structure import UnknownArchitectureError, find_spec

__getattr__, __dir__ = lazily(
    __name__,
    {
        "ArchSpec": "lit_edit.models.spec",
        "LanguageModel": "lit_edit.models.language_model",
        "ModelAdapter": "lit_edit.models.adapter",
        "ModelUnavailableError": "lit_edit.models.packaged",
        "UnknownArchitectureError": "lit_edit.models.structure",
        "find_spec": "lit_edit.models.structure",
    },
)

__all__ = [
    "ArchSpec",
    "LanguageModel",
    "ModelAdapter",
    "ModelUnavailableError",
    "UnknownArchitectureError",
    "find_spec",
]
