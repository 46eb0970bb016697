"""Makes what ``lit-edit editors`` and the completion read without importing torch: ``python docs/make_editors.py``."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser

import lit_edit.editors
from lit_edit import EditDataModule, EditStream, KeyStatistics, LanguageModel
from lit_edit.console.catalogue import FILE
from lit_edit.editors import Editor, UpdateTransform

SECTIONS = {
    "data": EditDataModule,
    "model": EditStream,
    "model.language_model": LanguageModel,
    "model.statistics": KeyStatistics,
}
"""What ``lit-edit fit`` can be told of stream and data, by how the names begin."""


def editors() -> Iterator[type[Editor]]:
    """Yield the editors that ``lit_edit.editors`` exports and that say what they are, in alphabetical order."""
    for name in sorted(lit_edit.editors.__all__, key=str.lower):
        kind = getattr(lit_edit.editors, name)
        concrete = inspect.isclass(kind) and issubclass(kind, Editor) and not inspect.isabstract(kind)
        if concrete and "about" in vars(kind):
            yield kind


def settings(kind: type) -> Iterator[dict[str, Any]]:
    """Yield what the parser of ``fit`` takes for a class: name, choices, default as YAML has it, and what it does.

    Settings that have settings of their own are followed by those.
    """
    made = [parent for parent in kind.__mro__ if "__init__" in vars(parent) and parent is not object]
    known = {p.name: p for parent in reversed(made) for p in inspect.signature(parent).parameters.values()}
    parser = ArgumentParser()
    names = parser.add_class_arguments(kind, "of")
    told = {action.dest: action.help for action in parser._actions}
    for name in dict.fromkeys(name.split(".")[1] for name in names):
        parameter = known[name]
        empty = parameter.default is inspect.Parameter.empty
        text = plain_text(told.get(f"of.{name}") or "")
        part = part_of(kind, str(parameter.annotation))
        optional = "None" in str(parameter.annotation)
        if part is None or optional:
            words = choices(kind, str(parameter.annotation))
            yield {
                "name": name,
                "choices": words,
                "default": None if empty else written(parameter.default),
                "text": text,
            }
        if part is not None:
            given = part() if empty or parameter.default is None else parameter.default
            for row in settings(part):
                own = getattr(given, row["name"]) if "." not in row["name"] else None
                yield {**row, "name": f"{name}.{row['name']}", "default": written(own)}


def part_of(kind: type, annotation: str) -> type | None:
    """Return the data class that an annotation names, if it does."""
    for parent in kind.__mro__:
        scope = vars(sys.modules[parent.__module__])
        for word in re.findall(r"\b[A-Z]\w+", annotation):
            found = scope.get(word)
            if inspect.isclass(found) and is_dataclass(found) and all(_has_default(field) for field in fields(found)):
                return found
    return None


def _has_default(field: Field[Any]) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


WORDS = {
    r"(?:Sequence|list)\[(?:Sequence|list)\[str\]\]": "lists of texts",
    r"(?:Sequence|list)\[int\]": "list of whole numbers",
    r"(?:Sequence|list)\[float\]": "list of numbers",
    r"(?:Sequence|list)\[str\]": "list of texts",
    r"\bint\b": "whole number",
    r"\bfloat\b": "number",
    r"\bbool\b": "true, false",
    r"\bstr\b": "text",
    r"\bNone\b": "null",
    r"\bEditor\b": "an editor",
}


def choices(kind: type, annotation: str) -> str:
    """Return what can be given, as one reads it: choices in place of a name for them, words in place of types."""
    listed = re.sub(r"Literal\[([^\]]*)\]", lambda found: found[1].replace("'", ""), annotation)
    for parent in kind.__mro__:
        scope = vars(sys.modules[parent.__module__])
        for word in set(re.findall(r"\b[A-Z]\w+", listed)):
            if get_origin(scope.get(word)) is Literal:
                listed = re.sub(rf"\b{word}\b", ", ".join(map(str, get_args(scope[word]))), listed)
            elif scope.get(word) is UpdateTransform:
                listed = f"list of {', '.join(transforms())}"
            elif (part := scope.get(word)) is not None and is_dataclass(part):
                listed = re.sub(rf"\b{word}\b", "settings as below", listed)
    for pattern, word in WORDS.items():
        listed = re.sub(pattern, word, listed)
    return listed.replace(" | ", ", ")


def transforms() -> list[str]:
    """Return the names of what can be put between an editor and the weights."""
    return [
        name
        for name in sorted(lit_edit.editors.__all__)
        if inspect.isclass(kind := getattr(lit_edit.editors, name)) and issubclass(kind, UpdateTransform)
        if not inspect.isabstract(kind) and kind is not UpdateTransform
    ]


def written(value: Any) -> str:
    """Return a value as YAML has it, in one line.

    Example:
        >>> written(None), written("plain"), written((1, 2)), written(5e-5), written(True)
        ('null', 'plain', '[1, 2]', '5e-05', 'true')
    """
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(written, value))}]"
    return str(value)


GREEK = {"lambda": "λ", "rho": "ρ", "alpha": "α", "epsilon": "ε", "eta": "η"}


def plain_text(text: str) -> str:
    r"""Return a docstring's text in one line, without the markup of references and formulas.

    Example:
        >>> plain_text("As :class:`~lit_edit.editors.MEMIT`, with\n:math:`x` or ``y``.")
        'As MEMIT, with x or y.'
    """
    text = re.sub(r":\w+:`~[\w.]*?(\w+)`", r"\1", text)
    text = re.sub(r":\w+:`([^`]*)`", r"\1", text)
    for name, letter in GREEK.items():
        text = text.replace(f"\\{name}", letter)
    return " ".join(text.replace("``", "").split())


def catalogue() -> str:
    """Return the file."""
    found = [
        {
            "name": kind.__name__,
            "about": asdict(kind.about),
            "summary": plain_text(inspect.getdoc(kind).partition("\n\n")[0]),
            "settings": list(settings(kind)),
        }
        for kind in editors()
    ]
    names = [f"{section}.{setting['name']}" for section, kind in SECTIONS.items() for setting in settings(kind)]
    text = json.dumps({"editors": found, "settings": names}, indent=1, ensure_ascii=False)
    one_a_line = re.compile(r'\{\s*("name": .*,)\s*("choices": .*,)\s*("default": .*,)\s*("text": .*)\s*\}')
    return one_a_line.sub(r"{\1 \2 \3 \4}", text) + "\n"


if __name__ == "__main__":
    FILE.write_text(catalogue(), encoding="utf-8")
