"""Models: loading, and reading them layer by layer."""

from lit_edit.models.adapter import ModelAdapter, UnknownArchitectureError, find_spec
from lit_edit.models.spec import ArchSpec

__all__ = ["ArchSpec", "ModelAdapter", "UnknownArchitectureError", "find_spec"]
