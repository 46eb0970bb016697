"""General ability of a run's model, as it was after any number of its edits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_edit.errors import ArgumentError, counted
from lit_edit.files.paths import expand

Point = dict[str, Any]
"""``edits``, and ``tasks``: their records by name."""


Key = tuple[int, str, str, str]
"""What a record is of: number of edits, digest of all that the run had done by then, task, digest of its items."""


_KEY = ("edits", "state", "task", "items")


@dataclass(frozen=True)
class Asked:
    """What is measured."""

    tasks: tuple[str, ...]  # names
    folder: Path | None = None  # of their files; None takes them from the hub
    shots: int = 0  # answered items in front of each question
    limit: int = 100  # items per task; 0 for all
    generation: bool = True  # also what the model says, besides the likeliest option


def measure_run(run: Path, numbers: Sequence[int], asked: Asked, out: Path) -> list[Point]:
    """Measure a run's model after some numbers of edits, in their order, and write ``ability.json``.

    A task's result is kept as it comes (``results.jsonl``) and used again while the run has done the same by then and
    the task has the same items. ``ability.json`` has these tasks at all numbers of edits that are known, also from
    earlier. :class:`ArgumentError` if ``out`` holds results of other settings.
    """
    from tqdm import tqdm

    from lit_edit.ability.course import summarise_ability
    from lit_edit.ability.files import items_digest, load_task
    from lit_edit.ability.measure import measure_task
    from lit_edit.ability.tasks import find_tasks
    from lit_edit.files.paths import without_nan, write_json
    from lit_edit.ledger.journal import Journal
    from lit_edit.runs.files import journal_path
    from lit_edit.runs.folder import open_as_of, records_until
    from lit_edit.runs.reading import read_history
    from lit_edit.runs.results import ResultsFolder

    history = read_history(run)
    journal = Journal(journal_path(expand(run)), writable=False)
    if wrong := [number for number in numbers if not 0 <= number <= len(history.made)]:
        raise ArgumentError(f"--at {wrong[0]}: {run} has made {counted(len(history.made), 'edit')}")
    data = [load_task(task, asked.folder) for task in find_tasks(asked.tasks)]  # before a model is loaded
    out.mkdir(parents=True, exist_ok=True)
    folder = ResultsFolder(out, _as_row, "measurement")
    settings = {"shots": asked.shots, "limit": asked.limit, "generation": asked.generation}
    known = dict(folder.open(settings))

    items = {task.task.name: items_digest([task]) for task in data}

    def keys_at(number: int) -> list[Key]:
        state = journal.digest(records_until(history, journal.records, number))
        return [(number, state, name, digest) for name, digest in items.items()]

    def points_at(numbers: Iterable[int]) -> list[Point]:
        keys = {number: keys_at(number) for number in numbers}
        return [
            {"edits": number, "tasks": {key[2]: known[key] for key in own}}
            for number, own in keys.items()
            if all(key in known for key in own)
        ]

    missing = {number: [key for key in keys_at(number) if key not in known] for number in numbers}
    with tqdm(total=sum(map(len, missing.values())), desc="tasks", unit="task") as bar:
        for number in (number for number in numbers if missing[number]):
            with open_as_of(run, number) as opened, opened.stream.measuring():
                for key, task in zip(keys_at(number), data, strict=True):
                    if key in known:
                        continue
                    bar.set_postfix_str(f"{task.task.name} after {counted(number, 'edit')}")
                    known[key] = measure_task(
                        opened.stream.adapter,
                        opened.stream.tokenizer,
                        task,
                        asked.shots,
                        asked.limit or None,
                        asked.generation,
                    )
                    folder.append({**dict(zip(_KEY, key, strict=True)), "record": known[key]})
                    bar.update()
    made = len(history.made)
    everywhere = points_at(sorted({key[0] for key in known if key[0] <= made}))
    write_json(out / "ability.json", without_nan({"run": str(run), **summarise_ability(everywhere)}))
    return points_at(numbers)


def _as_row(row: Mapping[str, Any]) -> tuple[Key, dict[str, Any]]:
    key = (int(row["edits"]), str(row["state"]), str(row["task"]), str(row["items"]))
    return key, dict(row["record"])
