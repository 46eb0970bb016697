"""What was found of a model, in words and as YAML: where its parts are, how that is known, and whether it is proven."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from lit_edit.models.described import adds_as_described, check_passes
from lit_edit.models.families import SPECS
from lit_edit.models.presets import PUBLISHED, edit_layers, key_of
from lit_edit.models.structure import UnknownArchitectureError

if TYPE_CHECKING:
    from lit_edit.models.adapter import ModelAdapter
    from lit_edit.models.spec import ArchSpec


def describe_model(adapter: ModelAdapter, told: bool = False) -> dict[str, Any]:
    """Return what is known of a model, as JSON has it; what is claimed is tried in two short passes.

    Args:
        adapter: The model.
        told: Whether the user has said where its parts are.
    """
    spec, layers = adapter.spec, edit_layers(adapter)
    shapes = sorted({adapter.shape(layer) for layer in adapter.editable})
    proof = _proof(adapter)
    how = "as model.language_model.arch says" if told else "by its name" if spec in SPECS else "by its structure"
    why = "published, or measured" if key_of(adapter) in PUBLISHED else "from an eighth to a third of the depth"
    return {
        "family": spec.family,
        "found": how,
        "layers": {"path": spec.layers, "count": adapter.n_layers, "with_down_projection": list(adapter.editable)},
        "down_projection": {
            "path": spec.down_proj if isinstance(spec.down_proj, str) else list(spec.down_proj),
            "widths": [{"inner": d_in, "stream": d_out} for d_out, d_in in shapes],
        },
        "behind_it": {"norm": spec.output_norm, "scale": spec.output_scale and adapter.output_scale},
        "logits": "by the model itself" if spec.tail == "model" else f"{spec.norm or 'no norm'}, then the head",
        "rows": "packed" if adapter.packs else "whole" if adapter.whole else "padded",
        "edited_by_default": {"layers": list(layers), "why": why},
        "proven": proof == "",
        "fault": proof or None,
        "arch": as_settings(spec),
    }


def as_settings(spec: ArchSpec) -> dict[str, Any]:
    """Return a description as ``model.language_model.arch`` has it, without what is as by default.

    Example:
        >>> from lit_edit.models.spec import ArchSpec
        >>> as_settings(ArchSpec("mine", "layers", ("mlp.down", "mlp.out"), None, tail="model"))
        {'family': 'mine', 'layers': 'layers', 'down_proj': ['mlp.down', 'mlp.out'], 'norm': None, 'tail': 'model'}
    """
    found = {part.name: getattr(spec, part.name) for part in fields(spec) if getattr(spec, part.name) != part.default}
    found.pop("model_types", None)  # a family's own
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def _proof(adapter: ModelAdapter) -> str:
    """Return what is wrong with a description; nothing where the model does what it says."""
    try:
        check_passes(adapter)
    except UnknownArchitectureError as error:
        return str(error)
    if not adds_as_described(adapter):
        return "what the MLP says is not what reaches the residual stream: the strength of edits is a guess"
    return ""
