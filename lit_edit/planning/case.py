"""What a plan is made for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_edit.editors.closed_form.engine import ClosedFormEditor
from lit_edit.planning.estimate import Setup, Speed
from lit_edit.planning.sizes import ModelSizes
from lit_edit.planning.workload import Workload

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Case:
    """What is planned."""

    name: str
    editor: ClosedFormEditor
    sizes: ModelSizes
    setup: Setup
    workload: Workload
    speed: Speed

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        setup = {**vars(self.setup), "dtype": short_name(self.setup.dtype), "storage": vars(self.setup.storage)}
        return {
            "model": self.name,
            "editor": type(self.editor).__name__,
            "sizes": vars(self.sizes),
            "setup": setup,
            "workload": vars(self.workload),
            "speed": vars(self.speed),
        }


def short_name(dtype: torch.dtype) -> str:
    """Return what a type is called, for example ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
