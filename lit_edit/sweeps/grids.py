"""Grids of runs: a YAML file of axes, and the points they span. Nothing is run here; settings are not looked into."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from lit_edit.console.configs import readable_yaml
from lit_edit.data.files import read_text
from lit_edit.errors import ArgumentError, shorten

KEYS = ("name", "base", "settings", "grid")
OF_THE_SWEEP = ("run_name", "runs_dir", "resume", "overwrite", "ckpt_path", "print_config", "help")
PLAIN = ("seed_everything", "continue")
LONGEST_NAME = 120


@dataclass(frozen=True)
class Choice:
    """One value of one axis."""

    axis: str
    label: str  # as tables and messages show it
    part: str  # as the names of points have it
    configs: tuple[str, ...]  # that it adds
    settings: dict[str, Any]  # that it makes, by their names on the command line


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    index: int  # its place in the grid, from 0
    name: str  # of its run folder
    choices: tuple[Choice, ...]  # one per axis

    @property
    def labels(self) -> dict[str, str]:
        """The values by axis, as tables show them."""
        return {choice.axis: choice.label for choice in self.choices}

    def __str__(self) -> str:
        return ", ".join(f"{axis}: {label}" for axis, label in self.labels.items())


@dataclass(frozen=True)
class Grid:
    """A sweep: what all of its runs share, and the axes whose product they are."""

    path: Path  # the file
    name: str  # of the sweep's folder
    base: tuple[str, ...]  # configs, in order
    settings: dict[str, Any]  # of every run
    axes: dict[str, list[Choice]]  # values by axis
    points: list[Point]  # all combinations; the last axis changes fastest

    def arguments(self, choices: Iterable[Choice]) -> list[str]:
        """Return what ``lit-edit fit`` is given for some values of the axes: configs first, then settings."""
        choices = tuple(choices)
        configs = [*self.base, *(config for choice in choices for config in choice.configs)]
        settings = dict(self.settings)
        for choice in choices:
            settings |= choice.settings
        words = [word for config in configs for word in ("--config", config)]
        return [*words, *(f"--{name}={as_text(value)}" for name, value in settings.items())]


def read_grid(path: Path) -> Grid:
    """Read a grid; the :class:`ArgumentError` names the file and the entry that cannot be."""
    with readable_yaml(path):
        text = read_text(path)
        _check_twice(path, yaml.compose(text, yaml.SafeLoader))
        content = yaml.safe_load(text)
    if not isinstance(content, dict):
        raise ArgumentError(f"{path}: a grid has the entries {', '.join(KEYS)}, got {shorten(repr(content))}")
    if unknown := [str(key) for key in content if key not in KEYS]:
        raise ArgumentError(f"{path}: unknown entry {unknown[0]!r}; a grid has the entries {', '.join(KEYS)}")
    name = _folder_name(str(path), content.get("name", path.stem))
    base = _configs(path, "base", content.get("base"))
    settings = _settings(path, "settings", content.get("settings") or {})
    axes_given = content.get("grid")
    if not isinstance(axes_given, dict) or not axes_given:
        raise ArgumentError(f"{path}: grid must hold the axes by name, got {shorten(repr(axes_given))}")
    shown = short_names([str(axis) for axis in axes_given])
    axes = {str(axis): _axis(path, str(axis), values, shown[str(axis)]) for axis, values in axes_given.items()}
    _check_overlaps(path, settings, axes)
    points = [
        Point(index, "+".join(choice.part for choice in choices), choices)
        for index, choices in enumerate(itertools.product(*axes.values()))
    ]
    _check_names(path, points)
    return Grid(path, name, base, settings, axes, points)


def with_changes(grid: Grid, where: str, name: str | None = None, settings: Mapping[str, Any] | None = None) -> Grid:
    """Return a grid under another name, or with other settings of every run, which win over those of its file.

    ``where`` says in messages where the changes come from.
    """
    made = grid.settings | _settings(Path(where), "settings", dict(settings or {}))
    _check_overlaps(grid.path, made, grid.axes)
    return replace(grid, name=grid.name if name is None else _folder_name(where, name), settings=made)


def _folder_name(where: str, name: Any) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[\w.+=@-]+", name) or not name.strip("."):
        raise ArgumentError(f"{where}: name must be a plain folder name, got {shorten(repr(name))}")
    return name


def _axis(path: Path, axis: str, values: Any, shown: str) -> list[Choice]:
    where = f"{path}: grid: {axis}"
    if isinstance(values, dict) and values:
        return [_labelled(where, axis, str(label), value) for label, value in values.items()]
    if not isinstance(values, list) or not values:
        raise ArgumentError(
            f"{where}: expected a list of values, or values by label, at least one; got {shorten(repr(values))}"
        )
    for value in values:
        if isinstance(value, dict):
            raise ArgumentError(
                f"{where}: {shorten(repr(value))} makes several settings and needs a label: write the axis as "
                "'label: {...}' instead of a list"
            )
    if axis == "config":
        configs = _configs(path, f"grid: {axis}", values)
        return [Choice(axis, config, _plain(where, Path(config).stem), (config,), {}) for config in configs]
    return [_single(where, axis, label_of(value), value, shown) for value in values]


def _labelled(where: str, axis: str, label: str, value: Any) -> Choice:
    if not isinstance(value, dict):
        if axis == "config":
            return Choice(axis, label, _plain(where, label), _configs(Path(where), label, value), {})
        return _single(where, axis, label, value, "")
    settings = {name: part for name, part in value.items() if name != "config"}
    configs = _configs(Path(where), label, value["config"]) if "config" in value else ()
    return Choice(axis, label, _plain(where, label), configs, _settings(Path(where), label, settings))


def _single(where: str, axis: str, label: str, value: Any, shown: str) -> Choice:
    if "." not in axis and axis not in PLAIN:
        raise ArgumentError(
            f"{where}: an axis of plain values is named after the setting that they are of (data.limit; or config); "
            f"got {axis!r}. Under another name, say what each value sets: 'label: {{data.limit: 10}}'"
        )
    settings = _settings(Path(where), label, {axis: value})
    part = _plain(where, label)
    return Choice(axis, label, f"{shown}={part}" if shown else part, (), settings)


def _settings(path: Path, where: str, given: Any) -> dict[str, Any]:
    """Check settings by their names on the command line."""
    if not isinstance(given, dict):
        raise ArgumentError(f"{path}: {where}: expected settings by name (data.limit: 10), got {shorten(repr(given))}")
    for name, value in given.items():
        if name in OF_THE_SWEEP:
            raise ArgumentError(f"{path}: {where}: {name} is the sweep's own; leave it out")
        if name == "config":
            raise ArgumentError(f"{path}: {where}: configs stand under base, or in a value of an axis")
        if not isinstance(name, str) or (not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", name) and name not in PLAIN):
            raise ArgumentError(
                f"{path}: {where}: {shorten(repr(name))} is no setting as on the command line (data.limit, "
                "model.editor.init_args.layers)"
            )
        try:
            as_text(value)
        except TypeError:
            raise ArgumentError(
                f"{path}: {where}: {name}: expected a number, text, list or settings, got {shorten(repr(value))}"
            ) from None
    return dict(given)


def _configs(path: Path, where: str, given: Any) -> tuple[str, ...]:
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise ArgumentError(
            f"{path}: {where}: expected names or files of configs, as for --config; got {shorten(repr(given))}"
        )
    return tuple(names)


def _check_overlaps(path: Path, settings: Mapping[str, Any], axes: Mapping[str, list[Choice]]) -> None:
    """Refuse settings that are made in two places: one of them would silently not count."""
    made = dict.fromkeys(settings, "settings")
    for axis, choices in axes.items():
        names = dict.fromkeys(name for choice in choices for name in choice.settings)
        if both := [name for name in names if name in made]:
            other = made[both[0]]
            raise ArgumentError(f"{path}: {both[0]} is set by grid: {axis} and by {other}; leave one of them out")
        made |= dict.fromkeys(names, f"grid: {axis}")


def _check_names(path: Path, points: list[Point]) -> None:
    """Refuse points that would share a folder, also where upper and lower case are one, or whose name is too long."""
    found: dict[str, Point] = {}
    for point in points:
        other = found.setdefault(point.name.lower(), point)
        if other is not point:
            raise ArgumentError(
                f"{path}: two points have the name {point.name} ({other}; {point}): give their values labels "
                "('label: value' instead of a list)"
            )
        if len(point.name.encode()) > LONGEST_NAME:
            raise ArgumentError(
                f"{path}: the name {shorten(point.name)} has more than {LONGEST_NAME} characters: give values shorter "
                "labels ('label: value' instead of a list)"
            )


def _check_twice(path: Path, node: yaml.Node | None) -> None:
    """Refuse a name that stands twice in one place: YAML would take the last and say nothing."""
    if isinstance(node, yaml.MappingNode):
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and counts[key.value] > 1:
                line = node.start_mark.line + 1
                raise ArgumentError(f"{path}: {key.value!r} stands twice in the settings that begin in line {line}")
            _check_twice(path, value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_twice(path, value)


def as_text(value: Any) -> str:
    """Return a value as it is written on the command line; a date, say, has no such form (:class:`TypeError`).

    Example:
        >>> as_text([6, 7]), as_text(None), as_text("d4s")
        ('[6, 7]', 'null', 'd4s')
    """
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else f"{'-' if value < 0 else ''}.inf"
    return json.dumps(value, ensure_ascii=False)


def label_of(value: Any) -> str:
    """Return a short label of a value.

    Example:
        >>> label_of([6, 7, 8, 9, 10]), label_of([8, 10]), label_of(None), label_of(0.5), label_of("a/b")
        ('6-10', '8.10', 'null', '0.5', 'a/b')
    """
    if isinstance(value, list):
        whole = all(isinstance(part, int) and not isinstance(part, bool) for part in value)
        if whole and len(value) > 2 and value == list(range(value[0], value[0] + len(value))):
            return f"{value[0]}-{value[-1]}"
        return ".".join(label_of(part) for part in value)
    return as_text(value)


def short_names(axes: list[str]) -> dict[str, str]:
    """Return the ends of dotted names, as long as they must be to differ.

    Example:
        >>> list(short_names(["data.limit", "model.a.seed", "model.b.seed"]).values())
        ['limit', 'a.seed', 'b.seed']
    """
    short = {}
    for axis in axes:
        parts = axis.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        short[axis] = next(
            (end for end in ends if not any(o != axis and (o == end or o.endswith(f".{end}")) for o in axes)), axis
        )
    return short


def is_seed(axis: str) -> bool:
    """Tell whether an axis varies a seed: its table is also averaged over it.

    Example:
        >>> is_seed("data.shuffle_seed"), is_seed("seed_everything"), is_seed("seeds"), is_seed("data.limit")
        (True, True, True, False)
    """
    return axis == "seed_everything" or re.search(r"(^|[._])seeds?$", axis) is not None


def _plain(where: str, label: str) -> str:
    """Return a label as it can stand in the name of a folder."""
    part = re.sub(r"[^\w.=@-]+", "-", label).strip("-")
    if not part.strip("."):
        raise ArgumentError(f"{where}: {shorten(repr(label))} cannot name a folder: give the value a label")
    return part
