"""Models: loading, and reading them layer by layer."""

from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.language_model import LanguageModel
from lit_edit.models.packaged import ModelUnavailableError
from lit_edit.models.spec import ArchSpec
from lit_edit.models.structure import UnknownArchitectureError, find_spec

__all__ = [
    "ArchSpec",
    "LanguageModel",
    "ModelAdapter",
    "ModelUnavailableError",
    "UnknownArchitectureError",
    "find_spec",
]
