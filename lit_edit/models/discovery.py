"""The parts of a model that no family file describes, found by its structure.

Nothing is run here, and nothing is read but modules and the configuration: it works on the meta device too. What was
found is proven in :mod:`lit_edit.models.proof` before it is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from lit_edit.models.spec import ArchSpec

# Modules that map from an inner width back to the residual stream and are no MLP; by their class or their name.
_MIXERS = re.compile(
    r"att(entio)?n|mamba|ssm|conv|recurrent|delta|mixer|rotary|router|indexer|compress|norm|embed|lora", re.IGNORECASE
)
# What is called so by its class is none of these, whatever its name (Nemotron-H calls all its parts mixers).
_MLP = re.compile(r"mlp|feed_?forward|ffn", re.IGNORECASE)
# What leads inwards, or belongs to attention where that is no module of its own; by its own name.
_INWARD = re.compile(
    r"gate|router|up_proj|\bup\b|\bq\b|query|key|value|_o\b|out_proj|o_proj|c_attn|dense$|receptance|^linear$"
)
# What normalises the MLP's output, as it is called where it stands behind it.
_BEHIND = re.compile(r"post_?(feed_?forward|mlp|ffn)\w*norm", re.IGNORECASE)
# Lists that are not of the decoder's own layers; by their path.
_ELSEWHERE = re.compile(r"vision|visual|image|audio|speech|encoder(?!\w*decoder)|mtp|nextn|\bexperts\b", re.IGNORECASE)


class NothingFoundError(ValueError):
    """A model has no part that could be what is looked for; the message says which, and what there was."""


def discover(model: Any) -> ArchSpec:
    """Return where a decoder keeps its layers and their down projections.

    Raises:
        NothingFoundError: If it has no list of layers, or these have no linear map from an inner width to the stream.
    """
    config = model.config.get_text_config(decoder=True)
    width = _width(config)
    lists = list(_lists(model))
    if not lists:
        raise NothingFoundError("no list of layers was found: looked for a ModuleList of modules of one kind")
    best: tuple[int, int, str, tuple[str, ...]] | None = None
    for path, layers in lists:
        paths = tuple(dict.fromkeys(found for layer in layers if (found := down_projection(layer, width))))
        editable = sum(down_projection(layer, width) is not None for layer in layers)
        if editable and (best is None or (editable, len(layers)) > best[:2]):
            best = (editable, len(layers), path, paths)
    if best is None:
        sizes = ", ".join(f"{path} ({len(layers)} of {type(layers[0]).__name__})" for path, layers in lists)
        raise NothingFoundError(
            f"no layer has a linear map from an inner width to the residual stream of width {width} outside its "
            f"attention; looked in {sizes}"
        )
    _, _, path, paths = best
    scale = getattr(config, "residual_multiplier", None)
    return ArchSpec(
        family=str(model.config.model_type),
        layers=path,
        down_proj=paths if len(paths) > 1 else paths[0],
        norm=None,
        output_norm=_output_norm(dict(lists)[path], paths, width),
        output_scale="residual_multiplier" if isinstance(scale, (int, float)) and scale != 1 else None,
        tail="model",
        rows="whole",
    )


def _width(config: PreTrainedConfig) -> int:
    for name in ("hidden_size", "d_model", "n_embd", "dim_model", "embed_dim"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    raise NothingFoundError(
        f"the configuration of {config.model_type!r} does not say how wide the residual stream is (hidden_size)"
    )


def _lists(model: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    """Yield lists of layers, outermost first."""
    taken: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not _ELSEWHERE.search(path):
            if any(path.startswith(f"{outer}.") for outer in taken):
                continue
            if any(True for _ in module[0].parameters()):
                taken.append(path)
                yield path, list(module)


def _output_norm(layers: list[nn.Module], paths: tuple[str, ...], width: int) -> str | None:
    """Return the path of the norm behind the MLP that all layers have, by its name; what it does is proven later."""
    found = {
        tuple(
            name
            for name, module in layer.named_children()
            if _BEHIND.search(name) and getattr(getattr(module, "weight", None), "shape", None) == (width,)
        )
        for layer in layers
    }
    [names] = found if len(found) == 1 else [()]
    experts = any("expert" in path for path in paths)  # what is normalised is then a sum with what others say
    return names[0] if len(names) == 1 and not experts else None


def down_projection(layer: nn.Module, width: int) -> str | None:
    """Return the path of a layer's last linear map to the residual stream that belongs to no mixer of tokens.

    Of a mixture of experts only an expert counts that all tokens pass.
    """
    found = [
        path
        for path, module in layer.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and _outputs(module) == width and not _excluded(layer, path)
    ]
    return found[-1] if found else None


def _own_name(kind: str, layer: str) -> str:
    """Return a class's name without the words that it begins with like the layer's: those are the model's.

    Example:
        >>> _own_name("RecurrentGemmaMlp", "RecurrentGemmaDecoderLayer"), _own_name("SeedOssMLP", "SeedOssDecoderLayer")
        ('Mlp', 'MLP')
        >>> _own_name("MambaMixer", "MambaBlock"), _own_name("Linear", "MambaBlock")
        ('Mixer', 'Linear')
    """
    words, others = (re.findall(r"[A-Z][a-z0-9_]*|[a-z0-9_]+", name) for name in (kind, layer))
    same = 0
    while same < min(len(words) - 1, len(others)) and words[same] == others[same]:
        same += 1
    return "".join(words[same:])


def _outputs(module: nn.Module) -> int:
    return int(module.weight.shape[1] if isinstance(module, Conv1D) else module.weight.shape[0])  # type: ignore[index]


def _excluded(layer: nn.Module, path: str) -> bool:
    """Tell whether a linear map of a layer is part of what mixes tokens, chooses experts, or is one of many experts."""
    names = path.split(".")
    owner = layer
    for name in names[:-1]:
        owner = owner.get_submodule(name)
        kind = _own_name(type(owner).__name__, type(layer).__name__)
        if isinstance(owner, nn.ModuleList) or _MIXERS.search(kind) or (_MIXERS.search(name) and not _MLP.search(kind)):
            return True
    return bool(_INWARD.search(names[-1]))
