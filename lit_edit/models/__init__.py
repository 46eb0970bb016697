"""Models: loading, and reading them layer by layer."""

from lit_edit.models.adapter import ModelAdapter, UnknownArchitectureError, find_spec
from lit_edit.models.language_model import LanguageModel
from lit_edit.models.packaged import ModelUnavailableError
from lit_edit.models.spec import ArchSpec

__all__ = [
    "ArchSpec",
    "LanguageModel",
    "ModelAdapter",
    "ModelUnavailableError",
    "UnknownArchitectureError",
    "find_spec",
]
