"""What is known of the editors, read from their source: importing them takes torch and transformers, seconds each.

Only what Python's grammar shows is read: names, constants, ``EditorInfo(...)``, ``replace(Other.about, ...)``. An
``about`` that is put together in another way is looked up by importing the editors after all.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HOME = "lit_edit.editors"


@dataclass(frozen=True)
class Setting:
    """A parameter of an editor's constructor.

    Attributes:
        name: Its name below ``model.editor.init_args``.
        type: As annotated.
        default: As written; ``None`` if it must be given.
    """

    name: str
    type: str
    default: str | None


@dataclass(frozen=True)
class KnownEditor:
    """An editor that can be chosen.

    Attributes:
        name: Of its class; ``lit_edit.editors.NAME`` is the class path.
        about: The fields of its :class:`lit_edit.editors.base.EditorInfo`.
        summary: First paragraph of its docstring, without markup.
        settings: What its constructor takes.
    """

    name: str
    about: dict[str, Any]
    summary: str
    settings: tuple[Setting, ...]


def known_editors() -> list[KnownEditor]:
    """Return the editors that ``lit_edit.editors`` exports and that say what they are, in alphabetical order."""
    sources = Sources()
    found = (_class_of(sources, HOME, name) for name in sources.exported())
    known = [
        KnownEditor(editor.node.name, editor.about(), editor.summary, tuple(editor.settings()))
        for editor in found
        if editor is not None and editor.says_what_it_is and editor.is_editor and not editor.is_abstract
    ]
    return sorted(known, key=lambda editor: editor.name.lower())


def setting_names() -> list[str]:
    """Return the names of what ``lit-edit fit`` can be told of stream and data, as their constructors take it."""
    sources, found = Sources(), list[str]()
    for prefix, module, name in (
        ("data", "data.datamodule", "EditDataModule"),
        ("model", "stream.edit_stream", "EditStream"),
        ("model.language_model", "models.language_model", "LanguageModel"),
        ("model.statistics", "stats.second_moment", "KeyStatistics"),
    ):
        known = _class_of(sources, f"lit_edit.{module}", name)
        if known is not None:
            fields = [node for node in known.node.body if isinstance(node, ast.AnnAssign)]  # of a dataclass
            names = [setting.name for setting in known.settings()] or [ast.unparse(field.target) for field in fields]
            found += [f"{prefix}.{name}" for name in names]
    return found


class _NotPlainError(Exception):
    """An expression says more than its source shows."""


class Sources:
    """Modules of this package as syntax trees, and the names in them."""

    def __init__(self) -> None:
        spec = find_spec(HOME)
        assert spec is not None  # noqa: S101 - for the type checker: it is a part of this package
        assert spec.origin is not None  # noqa: S101
        self._root = Path(spec.origin).parents[1]
        self._trees: dict[str, ast.Module | None] = {}

    def exported(self) -> list[str]:
        """Return the names that ``lit_edit.editors`` exports."""
        found = self.find(HOME, "__all__")
        return [] if found is None else list(ast.literal_eval(found[1]))

    def tree(self, module: str) -> ast.Module | None:
        """Return a module's tree; ``None`` if it is none of this package."""
        if module not in self._trees:
            parts = module.split(".")[1:]
            stem = self._root.joinpath(*parts)
            file = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
            ours = module.partition(".")[0] == HOME.partition(".")[0] and file.is_file()
            self._trees[module] = ast.parse(file.read_text(encoding="utf-8")) if ours else None
        return self._trees[module]

    def find(self, module: str, name: str) -> tuple[str, ast.expr | ast.ClassDef] | None:
        """Return the class or value that a name of a module stands for, and the module that defines it."""
        tree = self.tree(module)
        for node in () if tree is None else _statements(tree):
            if isinstance(node, ast.ClassDef) and node.name == name:
                return module, node
            if (value := _assigned(node, name)) is not None:
                return module, value
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self.find(node.module, alias.name)
        return None


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    for node in tree.body:
        yield node
        if isinstance(node, ast.If):  # what is imported for annotations alone
            yield from node.body


def _assigned(node: ast.stmt, name: str) -> ast.expr | None:
    """Return what a statement assigns to a name."""
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
        return node.value
    if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
        return node.value
    return None


@dataclass(frozen=True)
class _Class:
    """A class, as its source shows it."""

    sources: Sources
    module: str
    node: ast.ClassDef

    @cached_property
    def lineage(self) -> list[_Class]:
        """The class and those of this package that it inherits from, nearest first."""
        found = [self]
        for base in self.node.bases:
            parent = _class_of(self.sources, self.module, base.id) if isinstance(base, ast.Name) else None
            found += [] if parent is None else parent.lineage
        return found

    @property
    def is_editor(self) -> bool:
        """Whether it is a subclass of ``Editor``."""
        return "Editor" in [parent.node.name for parent in self.lineage[1:]]

    @property
    def says_what_it_is(self) -> bool:
        """Whether it has an ``about`` of its own."""
        return self._own("about") is not None

    @property
    def is_abstract(self) -> bool:
        """Whether a method is still missing."""
        missing: set[str] = set()
        for parent in reversed(self.lineage):
            for node in parent.node.body:
                if isinstance(node, ast.FunctionDef):
                    abstract = "abstractmethod" in [ast.unparse(mark) for mark in node.decorator_list]
                    missing = missing | {node.name} if abstract else missing - {node.name}
        return bool(missing)

    @property
    def summary(self) -> str:
        """First paragraph of its docstring, without markup."""
        return plain_text(inspect.cleandoc(ast.get_docstring(self.node) or "").partition("\n\n")[0])

    def about(self) -> dict[str, Any]:
        """Return the fields of its ``about``."""
        value = next((own for parent in self.lineage if (own := parent._own("about")) is not None), None)
        try:
            return dict(self._value(value))
        except _NotPlainError:
            return asdict(getattr(import_module(HOME), self.node.name).about)

    def settings(self) -> Iterator[Setting]:
        """Yield what its constructor takes; behind ``**kwargs`` that of the class above, without what it is given."""
        given: set[str] = set()
        for parent in self.lineage:
            constructor = next((n for n in parent.node.body if getattr(n, "name", "") == "__init__"), None)
            if not isinstance(constructor, ast.FunctionDef):
                continue
            for setting in parent._parameters(constructor.args):
                if setting.name not in given:
                    yield setting
                given.add(setting.name)
            if constructor.args.kwarg is None:
                return
            given |= {word.arg for call in _calls_above(constructor) for word in call.keywords if word.arg}

    def _own(self, name: str) -> ast.expr | None:
        return next((value for node in self.node.body if (value := _assigned(node, name)) is not None), None)

    def _parameters(self, arguments: ast.arguments) -> Iterator[Setting]:
        plain = [*arguments.posonlyargs, *arguments.args]
        defaults = [*[None] * (len(plain) - len(arguments.defaults)), *arguments.defaults, *arguments.kw_defaults]
        for argument, default in zip([*plain, *arguments.kwonlyargs], defaults, strict=True):
            if argument.arg != "self":
                kind = "" if argument.annotation is None else ast.unparse(argument.annotation)
                yield Setting(argument.arg, kind, None if default is None else self._written(default))

    def _written(self, node: ast.expr) -> str:
        """Return an expression as it is written; a name that stands for one, as that."""
        if isinstance(node, ast.Name) and (found := self.sources.find(self.module, node.id)) is not None:
            return node.id if isinstance(found[1], ast.ClassDef) else ast.unparse(found[1])
        return ast.unparse(node)

    def _value(self, node: ast.expr | None) -> Any:
        """Return what an expression comes to.

        Raises:
            _NotPlainError: If that cannot be seen.
        """
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._value(node.left) + self._value(node.right)
        if isinstance(node, ast.Name) and (found := self.sources.find(self.module, node.id)) is not None:
            if not isinstance(found[1], ast.ClassDef):
                return _Class(self.sources, found[0], self.node)._value(found[1])
        elif isinstance(node, ast.Attribute) and node.attr == "about" and isinstance(node.value, ast.Name):
            other = _class_of(self.sources, self.module, node.value.id)
            if other is not None:
                return other.about()
        elif isinstance(node, ast.Call) and all(word.arg for word in node.keywords):
            given = {str(word.arg): self._value(word.value) for word in node.keywords}
            if ast.unparse(node.func) == "replace" and len(node.args) == 1:
                return self._value(node.args[0]) | given
            if ast.unparse(node.func) == "EditorInfo" and len(node.args) <= len(self._fields):
                by_place = dict(zip(self._fields, map(self._value, node.args), strict=False))
                return self._fields | by_place | given
        raise _NotPlainError

    @cached_property
    def _fields(self) -> dict[str, Any]:
        """The fields of ``EditorInfo``, with their defaults."""
        found = self.sources.find(f"{HOME}.base", "EditorInfo")
        fields = [node for node in getattr(found and found[1], "body", ()) if isinstance(node, ast.AnnAssign)]
        return {ast.unparse(f.target): None if f.value is None else self._value(f.value) for f in fields}


def _class_of(sources: Sources, module: str, name: str) -> _Class | None:
    """Return the class that a name of a module stands for."""
    found = sources.find(module, name)
    return _Class(sources, found[0], found[1]) if found is not None and isinstance(found[1], ast.ClassDef) else None


def _calls_above(constructor: ast.FunctionDef) -> list[ast.Call]:
    calls = [node for node in ast.walk(constructor) if isinstance(node, ast.Call)]
    return [call for call in calls if ast.unparse(call.func) == "super().__init__"]


def plain_text(text: str) -> str:
    r"""Return a docstring's text in one line, without the markup of references and formulas.

    Example:
        >>> plain_text("As :class:`~lit_edit.editors.MEMIT`, with\n:math:`x` or ``y``.")
        'As MEMIT, with x or y.'
    """
    text = re.sub(r":\w+:`~[\w.]*?(\w+)`", r"\1", text)
    text = re.sub(r":\w+:`([^`]*)`", r"\1", text)
    return " ".join(text.replace("``", "").split())
