"""What is known of the editors, without importing them, which takes torch and transformers, seconds each.

It stands in ``editors.json``, which ``python docs/make_editors.py`` makes of the classes; a test compares the two.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOME = "lit_edit.editors"
FILE = Path(__file__).with_name("editors.json")


@dataclass(frozen=True)
class KnownEditor:
    """An editor that can be chosen."""

    name: str  # of its class in lit_edit.editors
    about: dict[str, Any]  # the fields of its EditorInfo
    summary: str  # first paragraph of its docstring, without markup
    settings: list[dict[str, str | None]]  # below model.editor.init_args: name, choices, default as in YAML, text


def known_editors() -> list[KnownEditor]:
    """Return the editors that ``lit_edit.editors`` exports and that say what they are, in alphabetical order."""
    return [KnownEditor(**editor) for editor in _read()["editors"]]


def settings_told(editor: KnownEditor, beginning: str = "  ", width: int = 100) -> Iterator[str]:
    """Yield what is known of an editor's settings, in lines: name, what it does, what can be given, and the default."""
    margin = " " * 24
    for setting in editor.settings:
        yield f"{beginning}{setting['name']}"
        default = "must be given" if setting["default"] is None else f"default: {setting['default']}"
        text = f"{setting['text']} ({setting['choices']}; {default})".strip()
        yield from textwrap.wrap(text, width, initial_indent=margin, subsequent_indent=margin)


def setting_names() -> list[str]:
    """Return the names of what ``lit-edit fit`` can be told of stream and data."""
    return list(_read()["settings"])


def _read() -> Any:
    return json.loads(FILE.read_text(encoding="utf-8"))
