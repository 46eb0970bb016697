"""Editors on the testbed's decoder: configs at its depth, and one edit at a time, made, measured and taken back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lit_edit.console.fit_parser import FitParser
from lit_edit.editors.base import Editor
from lit_edit.errors import ArgumentError
from lit_edit.models.adapter import ModelAdapter
from lit_edit.stats.second_moment import KeyStatistics
from lit_edit.studies.alone import SingleEdits
from lit_edit.studies.beliefs.agent import Agent
from lit_edit.studies.beliefs.coherence import Case, ModelBeliefs, measure_case, revised
from lit_edit.studies.beliefs.testbed import CORPUS
from lit_edit.targets.contexts import check_templates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEPTH = 30
"""Layers of the model that the configs that ship are written for."""


def make_editor(
    method: str, folder: Path, n_layers: int, layers: Sequence[int] | None, parser: FitParser | None = None
) -> Editor:
    """Return the editor of a config, on the testbed's layers and with its sentences before prompts.

    Without ``layers`` they are those at the config's relative depth. A parser is worth using again: building one takes
    longer than parsing.
    """
    parser = parser or FitParser()
    _parse_editor(method, folder, n_layers, layers, parser)
    editor: Editor = parser.make().model.editor
    if getattr(editor, "contexts", None) == "sampled":
        # The words that samples would begin with are none of this model's.
        first = (folder / CORPUS).read_text(encoding="utf-8").partition("\n")[0]
        sentences = [text for text in first.split(" . ") if text.strip(" .")]
        texts = sentences[: getattr(editor, "context_count", 5)]
        editor.contexts = check_templates([["{}"], [f"{text} . {{}}" for text in texts]])  # type: ignore[attr-defined]
    return editor


def check_methods(methods: Mapping[str, str], n_layers: int, layers: Sequence[int] | None) -> None:
    """Refuse before the training what cannot be edited with behind it."""
    if wrong := [layer for layer in layers or () if not 0 <= layer < n_layers]:
        raise ArgumentError(f"--layers {wrong[0]}: the decoder has layers 0 to {n_layers - 1}")
    parser = FitParser()
    for method in methods.values():
        _parse_editor(method, Path("decoder"), n_layers, layers, parser)


def _parse_editor(method: str, folder: Path, n_layers: int, layers: Sequence[int] | None, parser: FitParser) -> None:
    """Parse an editor's config, with its layers at the testbed's depth."""
    args = ["--config", "quickstart", "--config", method, f"--model.language_model.name={folder}"]
    arguments = parser.parse(args)["model"]["editor"]["init_args"]
    single = "layer" in arguments and "layers" not in arguments
    if single and layers is not None and len(layers) != 1:
        raise ArgumentError(f"--layers: {method} edits one layer, got {' '.join(map(str, layers))}")
    chosen = arguments.get("layer" if single else "layers")
    if layers is not None:
        chosen = layers[0] if single else sorted(set(layers))
    elif isinstance(chosen, list):
        chosen = scaled_layers(chosen, n_layers)
    elif single and chosen is not None:
        [chosen] = scaled_layers([chosen], n_layers)
    if chosen is not None:
        parser.parse([*args, f"--model.editor.init_args.{'layer' if single else 'layers'}={json.dumps(chosen)}"])


def scaled_layers(layers: Sequence[int], n_layers: int, depth: int = DEPTH) -> list[int]:
    """Return the layers at the same relative depth of another model: those that the given ones begin in.

    Example:
        >>> scaled_layers([6, 7, 8, 9, 10], 4), scaled_layers([21], 4)
        ([0, 1], [2])
    """
    return sorted({min(layer * n_layers // depth, n_layers - 1) for layer in layers})


class Bench(SingleEdits):
    """Makes single edits on the trained model of a folder, and measures what they do."""

    def __init__(self, editor: Editor, adapter: ModelAdapter, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        super().__init__(editor, adapter, tokenizer, KeyStatistics(corpus=str(folder / CORPUS)))

    def measure(self, case: Case, number: int, agent: Agent) -> dict[str, float | str]:
        """Make a case's edit, measure, and take it back; an edit that is refused is measured as none."""
        with self.made(case.request(number)) as refused:
            found = measure_case(ModelBeliefs(self.adapter, self.tokenizer), case, agent, revised(agent, case))
        return {**found, "refused": refused} if refused else {**found}
