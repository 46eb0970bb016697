"""Edit facts in language models, one after another, without wearing the model out.

Names are loaded when they are first used: ``import lit_edit`` alone is cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_edit.files.lazy import lazily

if TYPE_CHECKING:
    from lit_edit.data.datamodule import EditDataModule
    from lit_edit.data.request import EditRequest, Probe
    from lit_edit.editors import D4S, MEMIT, TargetSettings
    from lit_edit.export.delta import apply_delta
    from lit_edit.ledger.ownership import WeightsChangedError
    from lit_edit.models import ArchSpec, LanguageModel
    from lit_edit.session.changing import Outcome
    from lit_edit.session.opening import edit, open
    from lit_edit.session.resuming import resume
    from lit_edit.session.session import Session
    from lit_edit.stats.second_moment import KeyStatistics
    from lit_edit.stream.edit_stream import EditStream

__getattr__, __dir__ = lazily(
    __name__,
    {
        "ArchSpec": "lit_edit.models",
        "D4S": "lit_edit.editors",
        "EditDataModule": "lit_edit.data.datamodule",
        "EditRequest": "lit_edit.data.request",
        "EditStream": "lit_edit.stream.edit_stream",
        "KeyStatistics": "lit_edit.stats.second_moment",
        "LanguageModel": "lit_edit.models",
        "MEMIT": "lit_edit.editors",
        "Outcome": "lit_edit.session.changing",
        "Probe": "lit_edit.data.request",
        "Session": "lit_edit.session.session",
        "TargetSettings": "lit_edit.editors",
        "WeightsChangedError": "lit_edit.ledger.ownership",
        "apply_delta": "lit_edit.export.delta",
        "edit": "lit_edit.session.opening",
        "open": "lit_edit.session.opening",
        "resume": "lit_edit.session.resuming",
    },
)

__all__ = [
    "D4S",
    "MEMIT",
    "ArchSpec",
    "EditDataModule",
    "EditRequest",
    "EditStream",
    "KeyStatistics",
    "LanguageModel",
    "Outcome",
    "Probe",
    "Session",
    "TargetSettings",
    "WeightsChangedError",
    "apply_delta",
    "edit",
    "open",
    "resume",
]
