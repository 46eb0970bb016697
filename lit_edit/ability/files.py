"""The tasks' data, from a folder of files or from the hub."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lit_edit.ability.tasks import RESERVED, Item, Task
from lit_edit.data.files import SUFFIXES, read_file
from lit_edit.data.request import DataError
from lit_edit.files.hub import hub_fault, reaching_hub
from lit_edit.files.paths import expand


@dataclass(frozen=True)
class TaskData:
    """A task with its items."""

    task: Task
    shots: tuple[Item, ...]  # the first, which serve as examples and are never measured
    items: tuple[Item, ...]  # the others, in order


def load_task(task: Task, folder: str | Path | None = None) -> TaskData:
    """Read a task's items.

    Args:
        task: Which.
        folder: A folder with ``<task>.json`` or ``glue_<task>.json`` (or ``.jsonl``, ``.csv``), whose order is kept;
            ``None`` takes the task from the hub, in a fixed random order in which the labels take turns.

    Raises:
        DataError: If there is no such file or data set, a record is broken (names file and line) or too few are there.
    """
    if folder is None:
        place, records = f"{task.hub.path} ({task.hub.config})", _hub(task)
    else:
        path = find_file(task, expand(folder))
        place, records = str(path), ((f"{path}:{line}", record) for line, record in read_file(path))
    items = list(_items(task, records))
    if folder is None:
        items = in_turns(items)
    if len(items) <= RESERVED:
        raise DataError(
            f"{place}: {len(items)} items; {task.name} needs more than {RESERVED}, for so many at the head are kept as "
            "shots and not measured"
        )
    return TaskData(task, tuple(items[:RESERVED]), tuple(items[RESERVED:]))


def items_digest(data: Sequence[TaskData]) -> str:
    """Return what tells the items of some tasks from others: questions, answers, examples and their order."""
    items = {task.task.name: [[item.prompt, item.gold] for item in (*task.shots, *task.items)] for task in data}
    return hashlib.sha256(json.dumps(items, sort_keys=True).encode()).hexdigest()[:16]


def find_file(task: Task, folder: Path) -> Path:
    """Return the file of a task in a folder, if there is just one."""
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; expected one with a file per task, like {task.name}.json")
    paths = [folder / f"{prefix}{task.name}{suffix}" for prefix in ("", "glue_") for suffix in SUFFIXES]
    found = [path for path in paths if path.exists()]
    if not found:
        raise DataError(f"{folder}: no file for task {task.name}; expected {task.name}.json, .jsonl or .csv")
    if len(found) > 1:
        raise DataError(f"{folder}: two files for task {task.name}: {found[0].name} and {found[1].name}; keep one")
    return found[0]


def in_turns(items: Sequence[Item], seed: int = 0) -> list[Item]:
    """Shuffle items, then let the right options take turns, so that any first few are balanced.

    Example:
        >>> [item.gold for item in in_turns([Item(str(n), int(n > 2)) for n in range(5)])]
        [0, 1, 0, 1, 0]
    """
    shuffled = list(items)
    random.Random(seed).shuffle(shuffled)
    groups = [[item for item in shuffled if item.gold == gold] for gold in sorted({item.gold for item in items})]
    return [item for turn in zip_longest(*groups) for item in turn if item is not None]


def _items(task: Task, records: Iterable[tuple[str, Any]]) -> Iterator[Item]:
    for place, record in records:
        try:
            if isinstance(record, DataError):
                raise record
            yield task.item(record)
        except DataError as error:
            raise DataError(f"{place}: {error}") from None


def _hub(task: Task) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset

    hub = task.hub
    place = f"hub data set {hub.path!r} ({hub.config}, split {hub.split})"
    try:
        with reaching_hub():
            rows = load_dataset(hub.path, hub.config, split=hub.split)
    except Exception as error:  # the hub client raises many kinds; all mean the same to the user
        raise DataError(
            f"{place} cannot be loaded: {hub_fault(error)} (without the hub: give a folder with {task.name}.json)"
        ) from error
    names = getattr(getattr(rows, "features", {}).get(task.label_field), "names", None)
    if names is not None and tuple(names) != hub.names:
        raise DataError(f"{place} calls its labels {', '.join(names)}; expected {', '.join(hub.names)}, in this order")
    for number, row in enumerate(rows):
        yield f"{hub.path}, row {number}", row
