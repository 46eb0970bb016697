"""Lightning callbacks for edit streams; imported as ``lit_edit.callbacks``."""

from .closing_table import ClosingTable
from .figures import RunFigures
from .guard import HarmError, HarmGuard
from .layer_norms import LayerNorms
from .progress import EditProgressBar
from .retention import Retention
from .run_folder import RunFolder
from .wandb_report import WandbReport

__all__ = [
    "ClosingTable",
    "EditProgressBar",
    "HarmError",
    "HarmGuard",
    "LayerNorms",
    "Retention",
    "RunFigures",
    "RunFolder",
    "WandbReport",
]
