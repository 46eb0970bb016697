"""A method whose layers are to be chosen: its config, and editors made of it for any layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_edit.console.configs import find_config
from lit_edit.console.fit_parser import FitParser
from lit_edit.editors.base import Editor
from lit_edit.errors import ArgumentError
from lit_edit.studies.layers import BASE
from lit_edit.studies.layers.proposal import place_of_layers


class Method:
    """A method's config, by file or name, and the editors made of it for any layers of a model.

    Raises:
        ArgumentError: If ``lit-edit fit`` would refuse it, or it has no layers to choose.
    """

    def __init__(self, config: str, model: str, seed: int) -> None:
        self.parser = FitParser()
        words = ["--config", BASE, "--config", config, "--model.language_model.name", model]
        settings = self.parser.parse([*words, "--seed_everything", str(seed), "--data.source", "builtin"])
        self.config, self.editor = config, settings["model"]["editor"]
        self.statistics = settings["model"]["statistics"]
        self.window: int = settings["data"]["target_window"]
        if not self.editor or place_of_layers(self.editor) is None:
            name = str((self.editor or {}).get("class_path", "the method")).rpartition(".")[2]
            raise ArgumentError(
                f"--method {config}: {name} has no setting 'layers' to choose; use a method that edits the weights of "
                "layers (lit-edit editors)"
            )
        self.stream = self.parser.make()["model"]

    def content(self) -> dict[str, Any]:
        """Return what the method's own file says."""
        return yaml.safe_load(Path(find_config(self.config)).read_text(encoding="utf-8")) or {}

    def settings(self) -> dict[str, str]:
        """Return all settings that results depend on, but for the layers."""
        editor = copy.deepcopy(self.editor)
        place: Any = place_of_layers(editor)
        place.pop("layers")
        statistics = {name: value for name, value in self.statistics.items() if name not in ("cache", "force")}
        return {"window": str(self.window), **_flat("editor", editor), **_flat("statistics", statistics)}

    def make(self, layers: Sequence[int] | None) -> Editor:
        """Make an editor; ``None``: of the layers that it takes by itself.

        Raises:
            ValueError: If it does not edit so many layers.
        """
        place: Any = place_of_layers(self.parser.config["fit"]["model"]["editor"])
        place["layers"] = None if layers is None else list(layers)
        editor: Editor = self.parser.make()["model"].editor
        return editor


def _flat(name: str, value: Any) -> dict[str, str]:
    """Return settings by their full names, as text: they may be infinite, which JSON is not."""
    if isinstance(value, Mapping) and value:
        return {k: v for key, part in value.items() for k, v in _flat(f"{name}.{key}", part).items()}
    return {name: repr(value)}
