"""The proposal: a config for ``lit-edit fit``, with what speaks for it in its comments."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from lit_edit.studies.layers.search import Found
from lit_edit.studies.layers.trial import Trial

COLUMNS = ("score", "efficacy", "generalization", "locality", "agreement", "perplexity")


def place_of_layers(editor: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the mapping that holds ``layers`` among an editor's settings: its own, or of the one it wraps.

    Example:
        >>> inner = {"class_path": "MEMIT", "init_args": {"layers": [1]}}
        >>> place_of_layers({"class_path": "SimIE", "init_args": {"base": inner}})
        {'layers': [1]}
    """
    arguments = editor.get("init_args") or {}
    if "layers" in arguments:
        found: Mapping[str, Any] = arguments
        return found
    base: Any = arguments.get("base")
    return place_of_layers(base) if hasattr(base, "get") else None


def proposal_text(
    found: Found, model: str, editor: Mapping[str, Any], how: Sequence[str], more: Mapping[str, Any] | None = None
) -> str:
    """Return the proposal as YAML, below lines that say how it came about.

    ``more`` is what the method's own config says beside its editor; the trials were made with it.
    """
    editor = copy.deepcopy(dict(editor))
    place = place_of_layers(editor)
    if place is None:
        raise ValueError("the editor has no setting 'layers'")
    place["layers"] = list(found.proposed.layers)  # type: ignore[index]
    settings = copy.deepcopy(dict(more or {}))
    own = dict(settings.get("model") or {})
    own.pop("editor", None)
    named = {**(own.pop("language_model", None) or {}), "name": model}
    settings["model"] = {"language_model": named, "editor": editor, **own}
    lines = [*how, "", *held_out_lines(found)]
    comments = "".join(f"# {line}".rstrip() + "\n" for text in lines for line in (text.splitlines() or [""]))
    return comments + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, default_flow_style=None)


def held_out_lines(found: Found) -> list[str]:
    """Return the held-out comparison as lines of a table."""
    rows = [["layers", *COLUMNS]]
    trials = list(dict.fromkeys([found.best_held_out, found.default_held_out]))
    rows += [[_label(trial, found), *(as_cell(trial, name) for name in COLUMNS)] for trial in trials]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    before = found.best_held_out.perplexity_before
    lines = [
        f"On the {found.best_held_out.edits} held-out edits, made one after another and measured at the end "
        f"(perplexity of the unedited model: {'unknown' if before is None else f'{before:.2f}'}):",
    ]
    lines += ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return lines


def verdict(found: Found) -> str:
    """Say in one line what is proposed, and why."""
    if found.best.layers == found.default_held_out.layers:
        return f"The search found the default layers, {found.best.name}: they are proposed."
    if found.proposed is found.best_held_out:
        return f"Layers {found.best.name} are better than the default on the held-out edits: they are proposed."
    return (
        f"Layers {found.best.name}, the best of the search, are not better than the default on the held-out edits: the "
        "default is proposed."
    )


def as_cell(trial: Trial, name: str) -> str:
    """Return one of a trial's numbers for a table."""
    value = getattr(trial, name)
    if value is None:
        return "-"
    return f"{value:.2f}" if name == "perplexity" else f"{value:.3f}"


def _label(trial: Trial, found: Found) -> str:
    marks = ["default"] if trial is found.default_held_out else []
    marks += ["proposed"] if trial is found.proposed else []
    return trial.name + (f" ({', '.join(marks)})" if marks else "")
