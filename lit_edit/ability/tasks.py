"""The few-shot tasks: prompt, options, and which label means which option.

Prompts are those of the field's editing benchmarks (unified-model-editing, AlphaEdit). Their published code maps GLUE's
RTE labels the wrong way round (0 means entailment); here every task can be held against items whose answer is known.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

from lit_edit.data.request import DataError, shorten

RESERVED = 10  # items at the head of a task's data that serve as shots and are never measured


@dataclass(frozen=True)
class Item:
    """One question: a prompt, and the index of the right option."""

    prompt: str
    gold: int


@dataclass(frozen=True)
class HubSource:
    """Where a task lies on the hub.

    Attributes:
        path: Id of the data set.
        config: Name of its part.
        split: Which split; one whose labels are public.
        names: What the data set calls its labels, in the order of their numbers; none if it does not name them.
    """

    path: str
    config: str
    split: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A few-shot task whose answer is one of some options.

    Attributes:
        name: What files, logs and configs call it.
        title: What it asks.
        template: The prompt, with the record's fields in braces. It ends without a space: the space belongs to the
            answer's first token.
        options: The answers, as they follow the prompt.
        labels: Index of the right option, by the record's label (as lower-case text).
        hub: Where the data are on the hub.
        label_field: Field of the label.
        anchors: Index of the right option of items whose answer is beyond doubt, by :func:`digest` of their texts.

    Example:
        >>> TASKS["rte"].options[TASKS["rte"].item({"sentence1": "A", "sentence2": "B", "label": 0}).gold]
        'True'
    """

    name: str
    title: str
    template: str
    options: tuple[str, ...]
    labels: Mapping[str, int]
    hub: HubSource
    label_field: str = "label"
    anchors: Mapping[str, int] = field(default_factory=dict)

    @property
    def fields(self) -> tuple[str, ...]:
        """The record's fields that the prompt is made of."""
        names = (name.partition("[")[0] for _, name, _, _ in Formatter().parse(self.template) if name)
        return tuple(dict.fromkeys(names))

    def item(self, record: object) -> Item:
        """Turn a raw record into a question.

        Raises:
            DataError: If a field is missing, of the wrong kind or empty, the label is unknown, or it is not the answer
                that this item is known to have.
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


_NO_YES = {"0": 0, "1": 1}

_ALL = (
    Task(
        name="sst2",
        title="Is a film review positive?",
        template="Review :{sentence}\nSentiment :",
        options=("negative", "positive"),
        labels={**_NO_YES, "negative": 0, "positive": 1},
        hub=HubSource("nyu-mll/glue", "sst2", "validation", ("negative", "positive")),
        anchors={
            "42520e38d1e9": 1,
            "1e4c227f6927": 1,
            "9acb832c0efa": 1,
            "1bc25b6c3909": 0,
            "563f6c1fc9f9": 0,
            "26ec462d4efd": 0,
        },
    ),
    Task(
        name="mrpc",
        title="Do two sentences say the same?",
        template=(
            "Are the sentences paraphrases of each other.\nSentence 1: {sentence1}\nSentence 2: {sentence2}\nAnswer:"
        ),
        options=("No", "Yes"),
        labels={**_NO_YES, "not_equivalent": 0, "equivalent": 1},
        hub=HubSource("nyu-mll/glue", "mrpc", "validation", ("not_equivalent", "equivalent")),
        anchors={
            "f9073e2c9b57": 1,
            "e96034fc9862": 1,
            "493543f531c8": 1,
            "85418aa3d19f": 0,
            "ea4efafef09c": 0,
            "71a415895c9b": 0,
        },
    ),
    Task(
        name="cola",
        title="Is a sentence good English?",
        template="Is this sentence linguistically acceptable?\nSentence: {sentence}\nAnswer:",
        options=("No", "Yes"),
        labels={**_NO_YES, "unacceptable": 0, "acceptable": 1},
        hub=HubSource("nyu-mll/glue", "cola", "validation", ("unacceptable", "acceptable")),
        anchors={
            "b6148864db1a": 1,
            "93a9437f489b": 1,
            "428ca639ea04": 1,
            "bde6c91d01fa": 0,
            "44347d3d4c1f": 0,
            "f010fb1d008e": 0,
        },
    ),
    Task(
        name="rte",
        title="Does a second sentence follow from a text?",
        template="{sentence1}\nquestion: {sentence2} True or False?\nanswer:",
        options=("False", "True"),
        # GLUE numbers the labels entailment, not_entailment: 0 is the one that is true.
        labels={"0": 1, "1": 0, "entailment": 1, "not_entailment": 0},
        hub=HubSource("nyu-mll/glue", "rte", "validation", ("entailment", "not_entailment")),
        anchors={
            "daa606993c8c": 1,
            "095af4e8f21e": 1,
            "577d34aacbe7": 1,
            "9816db6657fa": 0,
            "099ed7707a79": 0,
            "60762b23f5f2": 0,
        },
    ),
    Task(
        name="nli",
        title="Does a text entail a sentence?",
        template="{sentence1} entails the {sentence2} True or False? Answer:",
        options=("False", "True"),
        labels={"0": 1, "1": 0, "entailment": 1, "not_entailment": 0},
        hub=HubSource("nyu-mll/glue", "rte", "train", ("entailment", "not_entailment")),
    ),
    Task(
        name="mmlu",
        title="Exam questions of 57 subjects",
        template=(
            "Question: {question}\n(A) {choices[0]}\n(B) {choices[1]}\n(C) {choices[2]}\n(D) {choices[3]}\nAnswer:"
        ),
        options=("A", "B", "C", "D"),
        labels={"0": 0, "1": 1, "2": 2, "3": 3, "a": 0, "b": 1, "c": 2, "d": 3},
        hub=HubSource("cais/mmlu", "all", "test", ("A", "B", "C", "D")),
        label_field="answer",
    ),
)

TASKS: Mapping[str, Task] = {task.name: task for task in _ALL}
"""By name."""


def find_tasks(names: Sequence[str]) -> list[Task]:
    """Return tasks by name.

    Raises:
        ValueError: If there is none, one is unknown, or one is named twice.

    Example:
        >>> [task.options for task in find_tasks(["cola"])]
        [('No', 'Yes')]
    """
    if isinstance(names, str) or not names:
        raise ValueError(f"tasks must be a list of at least one of {', '.join(TASKS)}, got {names!r}")
    if unknown := [name for name in names if name not in TASKS]:
        raise ValueError(f"tasks: there is no task {unknown[0]!r}; there are {', '.join(TASKS)}")
    if len(set(names)) < len(names):
        raise ValueError(f"tasks: one is named twice: {', '.join(names)}")
    return [TASKS[name] for name in names]
