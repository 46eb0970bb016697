"""Edits and where they come from."""

from lit_edit.data.request import DataError, EditRequest, Probe

__all__ = ["DataError", "EditRequest", "Probe"]
