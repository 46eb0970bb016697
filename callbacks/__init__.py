"""Lightning callbacks for edit streams; imported as ``lit_edit.callbacks``."""

from .ability import Ability
from .closing_table import ClosingTable
from .figures import RunFigures
from .guard import HarmError, HarmGuard
from .layer_norms import LayerNorms
from .me_perplexity import MEPerplexity
from .progress import EditProgressBar
from .protocol import ProtocolMetrics
from .replica_check import ReplicaCheck, ReplicaError
from .report import RunReport
from .retention import Retention
from .run_folder import RunFolder
from .stop_on_signal import StopOnSignal, StoppedBySignal
from .wandb_report import WandbReport

__all__ = [
    "Ability",
    "ClosingTable",
    "EditProgressBar",
    "HarmError",
    "HarmGuard",
    "LayerNorms",
    "MEPerplexity",
    "ProtocolMetrics",
    "ReplicaCheck",
    "ReplicaError",
    "Retention",
    "RunFigures",
    "RunFolder",
    "RunReport",
    "StopOnSignal",
    "StoppedBySignal",
    "WandbReport",
]
