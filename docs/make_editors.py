"""Makes what ``lit-edit editors`` and the completion read without importing torch: ``python docs/make_editors.py``."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser

import lit_edit.editors
from lit_edit import EditDataModule, EditStream, KeyStatistics, LanguageModel
from lit_edit.console.catalogue import FILE
from lit_edit.editors import Editor

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
    """Yield what the parser of ``fit`` takes for a class, with types and defaults as one writes them."""
    made = [parent for parent in kind.__mro__ if "__init__" in vars(parent) and parent is not object]
    known = {p.name: p for parent in reversed(made) for p in inspect.signature(parent).parameters.values()}
    names = ArgumentParser().add_class_arguments(kind, "of")
    for name in dict.fromkeys(name.split(".")[1] for name in names):
        default = None if known[name].default is inspect.Parameter.empty else written(known[name].default)
        yield {"name": name, "type": choices(kind, str(known[name].annotation)), "default": default}


def choices(kind: type, annotation: str) -> str:
    """Return a type as one reads it: in place of a name for choices the choices."""
    for parent in kind.__mro__:
        scope = vars(sys.modules[parent.__module__])
        for word in set(re.findall(r"\b[A-Z]\w+", annotation)):
            if get_origin(scope.get(word)) is Literal:
                listed = " | ".join(map(repr, get_args(scope[word])))
                annotation = re.sub(rf"\b{word}\b", listed, annotation)
    return annotation


def written(value: Any) -> str:
    """Return a value as it is written: of a dataclass what differs from its own defaults."""
    if not is_dataclass(value):
        return repr(value)
    plain = type(value)()  # type: ignore[misc] # an instance's
    own = ((field.name, getattr(value, field.name)) for field in fields(value))
    changed = ", ".join(f"{name}={part!r}" for name, part in own if part != getattr(plain, name))
    return f"{type(value).__name__}({changed})"


def plain_text(text: str) -> str:
    r"""Return a docstring's text in one line, without the markup of references and formulas.

    Example:
        >>> plain_text("As :class:`~lit_edit.editors.MEMIT`, with\n:math:`x` or ``y``.")
        'As MEMIT, with x or y.'
    """
    text = re.sub(r":\w+:`~[\w.]*?(\w+)`", r"\1", text)
    text = re.sub(r":\w+:`([^`]*)`", r"\1", text)
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
    one_a_line = re.compile(r'\{\s*("name": .*,)\s*("type": .*,)\s*("default": .*)\s*\}')
    return one_a_line.sub(r"{\1 \2 \3}", text) + "\n"


if __name__ == "__main__":
    FILE.write_text(catalogue(), encoding="utf-8")
