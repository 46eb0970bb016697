"""``lit-edit editors``: what it reads is what the classes are."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from dataclasses import asdict
from types import ModuleType
from typing import Any

import pytest
import yaml

import lit_edit.editors
from lit_edit.cli.editors import configs_of
from lit_edit.cli.main import main
from lit_edit.console.catalogue import FILE, KnownEditor, known_editors
from lit_edit.editors import Editor
from tests.conftest import script_of_docs

KNOWN = {editor.name: editor for editor in known_editors()}


def classes() -> list[type[Editor]]:
    found = [getattr(lit_edit.editors, name) for name in lit_edit.editors.__all__]
    editors = [kind for kind in found if inspect.isclass(kind) and issubclass(kind, Editor)]
    return [kind for kind in editors if not inspect.isabstract(kind) and "about" in vars(kind)]


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    return script_of_docs("make_editors")


def test_the_file_is_what_the_script_makes(maker: ModuleType) -> None:
    assert FILE.read_text(encoding="utf-8") == maker.catalogue(), "make it anew: python docs/make_editors.py"
    assert maker.plain_text("As :class:`~a.b.Half`, with\n:math:`x` or ``y``.") == "As Half, with x or y."


def test_all_editors_are_found() -> None:
    assert {kind.__name__ for kind in classes()} == set(KNOWN)
    assert {"D4S", "MEMIT"} <= set(KNOWN)
    assert list(KNOWN) == sorted(KNOWN, key=str.lower)


@pytest.mark.parametrize("kind", classes())
def test_what_is_read_is_what_the_class_is(kind: type[Editor], maker: ModuleType) -> None:
    known = KNOWN[kind.__name__]
    assert known.about == asdict(kind.about)
    first = (inspect.cleandoc(kind.__doc__ or "")).partition("\n\n")[0]
    assert known.summary == maker.plain_text(first)
    assert known.summary


def parameters(kind: type) -> dict[str, inspect.Parameter]:
    """All parameters of a constructor, those behind ``**kwargs`` as well."""
    found: dict[str, inspect.Parameter] = {}
    for parent in kind.__mro__:
        if "__init__" not in vars(parent) or parent is object:
            continue
        own = list(inspect.signature(parent).parameters.values())
        found = {**{p.name: p for p in own}, **found}
        if not any(p.kind is p.VAR_KEYWORD for p in own):
            break
    return {name: p for name, p in found.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


@pytest.mark.parametrize("kind", classes())
def test_settings_are_those_of_the_constructor(kind: type[Editor]) -> None:
    real = parameters(kind)
    settings = {setting["name"]: setting for setting in KNOWN[kind.__name__].settings}
    assert {name.partition(".")[0] for name in settings} <= set(real)
    own = [name for name in inspect.signature(kind).parameters if name in real]
    assert set(own) <= {
        name.partition(".")[0] for name in settings
    }  # behind **kwargs some are given by the class itself
    for name, setting in settings.items():
        first, *rest = name.split(".")
        default = real[first].default
        if default is inspect.Parameter.empty:
            assert setting["default"] is None
            continue
        for part in rest if default is not None else ():
            default = getattr(default, part)
        if isinstance(default, (int, float, str)):
            assert yaml.safe_load(str(setting["default"])) == default or float(str(setting["default"])) == default
        assert setting["text"]
        assert not re.search(r"\b(int|float|str|bool|None|Sequence|Literal)\b|\w+Settings\b", str(setting["choices"]))


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["editors"]) == 0
    out = capsys.readouterr().out
    assert "…" not in out
    rows = {line.split()[1]: line for line in out.splitlines() if line.startswith("│ ")}
    assert "arXiv 2410.23843" in rows["D4S"]
    assert KNOWN["D4S"].about["title"] in rows["D4S"]


@pytest.mark.parametrize("editor", KNOWN.values(), ids=KNOWN)
def test_one_in_full(editor: KnownEditor, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["editors", editor.name]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for text in (editor.about["paper"], editor.about["cost"], editor.about["state"], editor.about["lacks"]):
        assert all(word in out for word in text.split())
    assert editor.summary.split()[0] in out
    assert all(str(setting["name"]) in out for setting in editor.settings)
    assert all(config in out for config in configs_of(editor.name))


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["editors", "--json"]) == 0
    everything: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in everything] == list(KNOWN)
    assert main(["editors", "--json", "d4s"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one == next(entry for entry in everything if entry["name"] == "D4S")
    assert one["class_path"] == "lit_edit.editors.D4S"
    assert one["undo"] == "exact"
    assert {"method/d4s", "method/d4s_turbo"} <= set(one["configs"])
    text = "How many texts to sample, one to five; the time of an edit goes with it."
    assert {"name": "context_count", "choices": "whole number", "default": "5", "text": text} in one["settings"]
    [residual] = [setting for setting in one["settings"] if setting["name"] == "residual"]
    assert residual["choices"] == "shared, remeasured, uniform, root, ends"
    [steps] = [setting for setting in one["settings"] if setting["name"] == "target.probability"]
    assert steps["default"] == "0.95"  # D4S's own, not that of the settings' class


@pytest.mark.parametrize(
    ("name", "meant"), [("MEMT", "did you mean MEMIT?"), ("xyzzy", "'xyzzy'; lit-edit editors lists")]
)
def test_unknown_names(name: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["editors", name]) == 2
    said = capsys.readouterr().err
    assert meant in said
    assert said.count("\n") == 1
    assert len(said) < 100


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from lit_edit.cli.main import main; main(['editors', 'D4S']); "
        "sys.exit(bool({'torch', 'transformers', 'lightning', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0
