"""Lightning callbacks for edit streams; imported as ``lit_edit.callbacks``."""

from .closing_table import ClosingTable
from .figures import RunFigures
from .layer_norms import LayerNorms
from .progress import EditProgressBar
from .retention import Retention
from .run_folder import RunFolder
from .wandb_report import WandbReport

__all__ = [
    "ClosingTable",
    "EditProgressBar",
    "LayerNorms",
    "Retention",
    "RunFigures",
    "RunFolder",
    "WandbReport",
]
