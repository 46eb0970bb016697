"""General ability: does the model still do what has nothing to do with the edits?"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lit_edit.ability.course import ability_metrics, summarise_ability
from lit_edit.ability.files import TaskData, items_digest, load_task
from lit_edit.ability.measure import measure_tasks
from lit_edit.ability.tasks import RESERVED, find_tasks
from lit_edit.models.adapter import ModelAdapter
from lit_edit.stream.edit_stream import EditStream
from lit_edit.stream.precision import passes_of

from .base import CourseCallback, check_every

log = logging.getLogger(__name__)


class Ability(CourseCallback):
    """Measures few-shot tasks on the unedited model, after every ``every`` edits, and at the end.

    Logs ``ability/<task>/accuracy``, ``f1`` and ``mcc`` (the likeliest option), the same with ``generated_`` in front
    (what the model says) and ``ability/<task>/unparsable``; puts all of it, with intervals and the change since the
    unedited model, into ``summary.json`` under ``ability``.

    Args:
        folder: Folder with a file per task (``sst2.json``, ``glue_rte.jsonl`` ...); ``None`` takes them from the hub.
        tasks: Which, of ``sst2``, ``mrpc``, ``cola``, ``rte``, ``nli``, ``mmlu``; ``None`` for all.
        shots: Answered items in front of each question, of the first ten, which are never measured.
        limit: Measure at most this many items of each task; 0 for all.
        every: Measure after every so many edits; 0 only before the first and behind the last.
        generation: Also let the model answer freely, besides comparing the likelihood of the options.
    """

    measured_by = "settings"

    def __init__(
        self,
        folder: str | None = None,
        tasks: Sequence[str] | None = None,
        shots: int = 0,
        limit: int = 100,
        every: int = 0,
        generation: bool = True,
    ) -> None:
        super().__init__(check_every(every, "Ability: every", 0))
        self.shots = check_every(shots, "Ability: shots", 0)
        self.limit = check_every(limit, "Ability: limit", 0)
        if shots > RESERVED:
            raise ValueError(f"Ability: shots must be at most {RESERVED}, the items that are kept for it, got {shots}")
        try:
            self.tasks = find_tasks(tasks)
        except ValueError as error:
            raise ValueError(f"Ability: {error}") from None
        self.folder, self.generation = folder, generation
        self._data: list[TaskData] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the tasks before the model is loaded: what is wrong with a file is said at once."""
        if stage == "fit":
            self._data = [load_task(task, self.folder) for task in self.tasks]

    def measure(self, stream: EditStream, adapter: ModelAdapter) -> dict[str, Any]:
        """Return the records of all tasks."""
        with torch.no_grad(), passes_of(stream.trainer):
            records = measure_tasks(
                adapter, stream.tokenizer, self._data, self.shots, self.limit or None, self.generation, stream.status
            )
        return {"tasks": records}

    def publish(self, stream: EditStream) -> None:
        """Put first and last measurement, the change, and the points between into the summary."""
        stream.extra["ability"] = summarise_ability(self.history)

    def report(self, stream: EditStream, seconds: float) -> None:
        """Log all numbers without their intervals, and say the accuracies."""
        last = self.history[-1]
        stream.log_at_edit({**ability_metrics(last["tasks"]), "time/ability": seconds})
        if stream.ranks.leads:
            found = ", ".join(
                f"{name} {record['likelihood']['accuracy']:.2f}" for name, record in last["tasks"].items()
            )
            log.info("general ability after %d edits: %s", last["edits"], found)

    def how(self) -> dict[str, Any]:
        """Return the settings, and what tells the items from others."""
        return {
            "items": items_digest(self._data),
            "tasks": [task.name for task in self.tasks],
            "shots": self.shots,
            "limit": self.limit,
            "generation": self.generation,
        }
