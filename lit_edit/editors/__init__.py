"""Editing methods, one small file each."""

from lit_edit.editors.base import Editor, EditorInfo, Proposal
from lit_edit.editors.closed_form.alphaedit import AlphaEdit
from lit_edit.editors.closed_form.d4s import D4S
from lit_edit.editors.closed_form.emmet import EMMET
from lit_edit.editors.closed_form.encore import ENCORE
from lit_edit.editors.closed_form.engine import ClosedFormEditor
from lit_edit.editors.closed_form.memit import MEMIT, MEMITSeq
from lit_edit.editors.closed_form.nse import NSE
from lit_edit.editors.closed_form.pmet import PMET
from lit_edit.editors.closed_form.rlsedit import RLSEdit
from lit_edit.editors.closed_form.rome import ROME, RROME
from lit_edit.editors.closed_form.simie import SimIE
from lit_edit.editors.closed_form.ultraedit import UltraEdit
from lit_edit.editors.gradient.engine import GradientEditor
from lit_edit.editors.gradient.ft import FT, FTL, FTM
from lit_edit.editors.gradient.lora_tuning import AdaLoRA, LoRA
from lit_edit.editors.gradient.mend import MEND
from lit_edit.editors.gradient.saul import SAUL
from lit_edit.editors.memory.engine import MemoryEditor
from lit_edit.editors.memory.grace import GRACE
from lit_edit.editors.memory.ike import IKE
from lit_edit.editors.memory.serac import SERAC
from lit_edit.editors.memory.wise import WISE
from lit_edit.editors.transforms.base import UpdateTransform
from lit_edit.editors.transforms.interpolate import Interpolate
from lit_edit.editors.transforms.norm_anchor import NormAnchor
from lit_edit.editors.transforms.prune import PRUNE
from lit_edit.editors.transforms.rect import RECT
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
