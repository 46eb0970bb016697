"""An editor, and what it was made with, as a config has it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any

from lit_edit.editors.base import Editor
from lit_edit.editors.transforms.base import UpdateTransform
from lit_edit.errors import ArgumentError


def describe(editor: Editor) -> dict[str, Any]:
    """Return an editor as ``class_path`` and ``init_args``, primitives, from which a config makes the same one.

    Raises:
        ArgumentError: If it was made with something that no file can say.

    Example:
        >>> from lit_edit.editors import MEMIT
        >>> describe(MEMIT(layers=[1, 2]))
        {'class_path': 'lit_edit.editors.MEMIT', 'init_args': {'layers': [1, 2]}}
    """
    return _described(editor, type(editor).__name__)


def _described(value: Any, name: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Editor):
        arguments = {key: _described(part, f"{name}.{key}") for key, part in value.init_args.items()}
        return {"class_path": _path_of(type(value)), "init_args": arguments}
    if isinstance(value, Mapping):
        return {str(key): _described(part, f"{name}.{key}") for key, part in value.items()}
    if isinstance(value, Sequence):
        return [_described(part, f"{name}[{index}]") for index, part in enumerate(value)]
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: _described(getattr(value, f.name), f"{name}.{f.name}") for f in fields(value) if f.init}
        return (
            {"class_path": _path_of(type(value)), "init_args": parts} if isinstance(value, UpdateTransform) else parts
        )
    raise ArgumentError(f"{name} is a {type(value).__name__}, which cannot be written into a file")


def _path_of(kind: type) -> str:
    """Return the shortest name that a class can be imported by."""
    if inspect.getmodule(kind) is None or kind.__module__ == "__main__" or "<" in kind.__qualname__:
        raise ArgumentError(f"the class {kind.__qualname__} cannot be imported by a name: put it into a module")
    public = getattr(import_module("lit_edit.editors"), kind.__name__, None) is kind
    return f"{'lit_edit.editors' if public else kind.__module__}.{kind.__name__}"
