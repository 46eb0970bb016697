"""``study``: a question of the field, from its data to its table. A new one is a line in :data:`STUDIES`."""

from __future__ import annotations

from collections.abc import Mapping

from lit_edit.console.parts import choose_part

STUDIES: Mapping[str, tuple[str, str]] = {
    "batch-size": (
        "lit_edit.studies.batch_size.run:run_batch_size",
        "the same edits in steps of 1, 4, 16, 64, 256 and all at once",
    ),
    "beliefs": (
        "lit_edit.studies.beliefs.run:run_beliefs",
        "an edit and a small model's other beliefs, against those of an ideal reader",
    ),
    "d4s": ("lit_edit.studies.d4s.run:run_d4s", "the D4S paper's questions: decline, norms, ability, settings"),
    "mqd": ("lit_edit.studies.mqd.run:run_mqd", "what the kind of question does to sequential editing"),
    "tracing": ("lit_edit.studies.localization.run:run_tracing", "whether causal tracing says where to edit"),
}
"""By name: the function that takes the arguments behind it, and what the help says."""


def run_study(args: list[str]) -> int:
    """Run a study; return the exit status."""
    run = choose_part("study", "Run a study: data, runs, tables and a figure.", ("study", "studies"), STUDIES, args)
    return 0 if run is None else run(args[1:]) or 0
