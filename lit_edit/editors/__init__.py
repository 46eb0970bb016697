"""Editing methods, one small file each."""

from lit_edit.editors.base import Editor, Proposal
from lit_edit.editors.closed_form import ClosedFormEditor
from lit_edit.editors.d4s import D4S
from lit_edit.editors.memit import MEMIT
from lit_edit.targets.optimize import TargetSettings

__all__ = ["D4S", "MEMIT", "ClosedFormEditor", "Editor", "Proposal", "TargetSettings"]
