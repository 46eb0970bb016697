"""The few-shot tasks: prompt, options, and which label means which option.

Prompts are those of the field's editing benchmarks (unified-model-editing, AlphaEdit). Their published code maps GLUE's
RTE labels the wrong way round (0 means entailment); here every task can be held against items whose answer is known.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from string import Formatter
from typing import Any

import yaml

from lit_edit.data.request import DataError
from lit_edit.errors import shorten

RESERVED = 10  # items at the head of a task's data that serve as shots and are never measured


@dataclass(frozen=True)
class Item:
    """One question: a prompt, and the index of the right option."""

    prompt: str
    gold: int


@dataclass(frozen=True)
class HubSource:
    """Where a task lies on the hub."""

    path: str  # id of the data set
    config: str  # name of its part
    split: str  # one whose labels are public
    names: tuple[str, ...] = ()  # of its labels, in the order of their numbers; none if it does not name them


@dataclass(frozen=True)
class Task:
    """A few-shot task whose answer is one of some options; ``tasks.yaml`` says what its fields are.

    Example:
        >>> [rte] = find_tasks(["rte"])
        >>> rte.options[rte.item({"sentence1": "A", "sentence2": "B", "label": 0}).gold]
        'True'
    """

    name: str  # in files, logs and configs
    title: str
    template: str
    options: tuple[str, ...]
    labels: Mapping[str, int]  # by the record's label: index of the right option
    hub: HubSource
    label_field: str = "label"
    anchors: Mapping[str, int] = field(default_factory=dict)  # by digest of an item's texts: the same, beyond doubt

    @property
    def fields(self) -> tuple[str, ...]:
        """The record's fields that the prompt is made of."""
        names = (name.partition("[")[0] for _, name, _, _ in Formatter().parse(self.template) if name)
        return tuple(dict.fromkeys(names))

    def item(self, record: object) -> Item:
        """Turn a raw record into a question.

        Raises:
            DataError: If a field or the label is missing or wrong, or not the answer that this item is known to have.
        """
        if not isinstance(record, Mapping):
            raise DataError(f"expected a record with fields, got {type(record).__name__}")
        texts = {name: self._text(record, name) for name in self.fields}
        gold = self._gold(record)
        known = self.anchors.get(digest([text for text in texts.values() if isinstance(text, str)]))
        if known is not None and known != gold:
            raise DataError(
                f"{self.label_field} {record[self.label_field]!r} means {self.options[gold]!r} in {self.name}, but the "
                f"answer of this item is {self.options[known]!r}: the file's labels are the wrong way round "
                f"({self._meanings()})"
            )
        return Item(self.template.format(**texts), gold)

    def prompt(self, item: Item, shots: Sequence[Item] = ()) -> str:
        """Return a question behind some answered ones, parted by empty lines."""
        answered = [f"{shot.prompt} {self.options[shot.gold]}" for shot in shots]
        return "\n\n".join([*answered, item.prompt])

    def _text(self, record: Mapping[str, Any], name: str) -> str | list[str]:
        if name not in record:
            raise DataError(f"missing field {name}; {self.name} needs {', '.join((*self.fields, self.label_field))}")
        value = record[name]
        if name == "choices":
            if not isinstance(value, (list, tuple)) or len(value) != len(self.options):
                raise DataError(f"choices must be a list of {len(self.options)} texts, got {shorten(repr(value))}")
            return [_checked(part, "a choice") for part in value]
        return _checked(value, name)

    def _gold(self, record: Mapping[str, Any]) -> int:
        if self.label_field not in record:
            raise DataError(f"missing field {self.label_field}, the answer")
        value = record[self.label_field]
        gold = None if isinstance(value, (bool, float)) else self.labels.get(str(value).strip().lower())
        if gold is None:
            raise DataError(f"{self.label_field} {shorten(repr(value))} is none of {self.name}'s ({self._meanings()})")
        return gold

    def _meanings(self) -> str:
        return ", ".join(f"{label} = {self.options[index]}" for label, index in self.labels.items())


def digest(texts: Sequence[str]) -> str:
    """Return a short hash of an item's texts, whatever their case and spacing.

    Example:
        >>> digest(["It 's  good ."]) == digest(["it 's good . "])
        True
    """
    plain = "\n".join(" ".join(text.split()).casefold() for text in texts)
    return hashlib.blake2b(plain.encode(), digest_size=6).hexdigest()


def _checked(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} must be text, got {type(value).__name__}")
    if not value.strip():
        raise DataError(f"{name} is empty")
    return value.strip()


@cache
def all_tasks() -> Mapping[str, Task]:
    """Return the tasks by name, as ``tasks.yaml`` describes them."""
    tasks = {}
    for name, told in yaml.safe_load((files("lit_edit.ability") / "tasks.yaml").read_text(encoding="utf-8")).items():
        index = {option: number for number, option in enumerate(told["options"])}
        path, config, split, names = told["hub"]
        tasks[name] = Task(
            name,
            told["title"],
            told["template"],
            tuple(index),
            {label: index[option] for label, option in told["labels"].items()},
            HubSource(path, config, split, tuple(names)),
            told.get("label", "label"),
            {item: index[option] for option, items in told.get("known", {}).items() for item in items},
        )
    return tasks


def find_tasks(names: Sequence[str] | None = None) -> list[Task]:
    """Return tasks by name, or all of them.

    Raises:
        ValueError: If there is none, one is unknown, or one is named twice.

    Example:
        >>> [task.options for task in find_tasks(["cola"])]
        [('No', 'Yes')]
    """
    tasks = all_tasks()
    if names is None:
        return list(tasks.values())
    if isinstance(names, str) or not names:
        raise ValueError(f"tasks must be a list of at least one of {', '.join(tasks)}, got {names!r}")
    if unknown := [name for name in names if name not in tasks]:
        raise ValueError(f"tasks: there is no task {unknown[0]!r}; there are {', '.join(tasks)}")
    if len(set(names)) < len(names):
        raise ValueError(f"tasks: one is named twice: {', '.join(names)}")
    return [tasks[name] for name in names]
