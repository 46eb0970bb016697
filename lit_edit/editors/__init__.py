"""Editing methods, one small file each."""

from lit_edit.editors.alphaedit import AlphaEdit
from lit_edit.editors.base import Editor, EditorInfo, Proposal
from lit_edit.editors.closed_form import ClosedFormEditor
from lit_edit.editors.d4s import D4S
from lit_edit.editors.emmet import EMMET
from lit_edit.editors.encore import ENCORE
from lit_edit.editors.ft import FT, FTL, FTM
from lit_edit.editors.grace import GRACE
from lit_edit.editors.gradient import GradientEditor
from lit_edit.editors.ike import IKE
from lit_edit.editors.interpolate import Interpolate
from lit_edit.editors.lora_tuning import AdaLoRA, LoRA
from lit_edit.editors.memit import MEMIT, MEMITSeq
from lit_edit.editors.memory_editor import MemoryEditor
from lit_edit.editors.mend import MEND
from lit_edit.editors.norm_anchor import NormAnchor
from lit_edit.editors.nse import NSE
from lit_edit.editors.pmet import PMET
from lit_edit.editors.prune import PRUNE
from lit_edit.editors.rect import RECT
from lit_edit.editors.rlsedit import RLSEdit
from lit_edit.editors.rome import ROME, RROME
from lit_edit.editors.saul import SAUL
from lit_edit.editors.serac import SERAC
from lit_edit.editors.simie import SimIE
from lit_edit.editors.transforms import UpdateTransform
from lit_edit.editors.ultraedit import UltraEdit
from lit_edit.editors.wise import WISE
from lit_edit.targets.optimize import TargetSettings

__all__ = [
    "D4S",
    "EMMET",
    "ENCORE",
    "FT",
    "FTL",
    "FTM",
    "GRACE",
    "IKE",
    "MEMIT",
    "MEND",
    "NSE",
    "PMET",
    "PRUNE",
    "RECT",
    "ROME",
    "RROME",
    "SAUL",
    "SERAC",
    "WISE",
    "AdaLoRA",
    "AlphaEdit",
    "ClosedFormEditor",
    "Editor",
    "EditorInfo",
    "GradientEditor",
    "Interpolate",
    "LoRA",
    "MEMITSeq",
    "MemoryEditor",
    "NormAnchor",
    "Proposal",
    "RLSEdit",
    "SimIE",
    "TargetSettings",
    "UltraEdit",
    "UpdateTransform",
]
