"""Where a model keeps the parts that editing touches.

Everything that knows of families is here: :func:`find_spec` says which names a model's parts have, :class:`Structure`
finds the parts by these names. What else reads a model asks a structure and never a path.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_edit.errors import ArgumentError, UserError, did_you_mean
from lit_edit.models.discovery import NothingFoundError, discover
from lit_edit.models.families import SPECS
from lit_edit.models.shards import is_sharded, written_class
from lit_edit.models.spec import ArchSpec


class UnknownArchitectureError(UserError):
    """The model's family is not described, or its description does not fit the model."""


def find_spec(model: nn.Module) -> ArchSpec:
    """Return the description of a model's family.

    Raises:
        UnknownArchitectureError: If no family fits; the message lists the model's modules and says what to write.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for spec in SPECS:
        if model_type in spec.model_types:
            return spec
    try:
        return discover(model)
    except NothingFoundError as error:
        raise UnknownArchitectureError(f"architecture {model_type!r}: {error}.\n{_describe(model)}") from None


def _describe(model: nn.Module) -> str:
    names = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", name) for name, _ in model.named_modules() if name)
    listing = "\n".join(f"  {name}" for name in names)
    return (
        f"The modules of this model ({{}} stands for the layer number):\n{listing}\n"
        "Describe it in YAML and pass the file with --config:\n"
        "  model:\n    language_model:\n      arch:\n"
        "        family: my-family\n        layers: <path to the list of decoder layers>\n"
        "        down_proj: <path from one layer to the MLP down projection>\n"
        "        norm: <path to the final norm, or null>"
    )


class Structure:
    """The parts of one decoder-only model.

    Args:
        model: A Hugging Face model.
        spec: Its family's description; found by ``config.model_type`` when not given.

    Attributes:
        layers: The decoder layers.
        editable: The numbers of those that have a down projection.
        norm: The final norm, if there is one.
        post_norm: What stands between final norm and head, if anything does.
        head: The language-model head.
        backbone: All of the model below the head.
        packs: Whether attention goes through transformers' interface, where a line of tokens can be told apart into
            rows.
        whole: Whether rows are always run from their first token on.
        attention: The kind of attention in passes of our own.
        layer_configs: The configurations that the layers look at.
        sharded: Whether several processes hold a part of each layer each.

    Raises:
        UnknownArchitectureError: If the family is unknown or ``spec`` names modules that the model does not have.
    """

    def __init__(self, model: PreTrainedModel, spec: ArchSpec | None = None) -> None:
        self.model = model
        self.sharded = any(is_sharded(parameter) for parameter in model.parameters())
        self.spec = spec or find_spec(model)
        self.layers = list(self._module(self.spec.layers))
        if not self.layers:
            raise UnknownArchitectureError(f"{self.spec.layers!r} holds no layers.\n{_describe(model)}")
        self.norm = self._optional(self.spec.norm)
        self.post_norm = self._optional(self.spec.post_norm)
        self.head = self._module(self.spec.head) if self.spec.head else model.get_output_embeddings()
        self._down_paths = [self._find_down(layer) for layer in self.layers]
        self.editable = tuple(index for index, path in enumerate(self._down_paths) if path is not None)
        self.down_proj(self.editable[0] if self.editable else 0)
        self.backbone: nn.Module = model.base_model
        self.backbone_prefix = next(f"{n}." if n else "" for n, m in model.named_modules() if m is self.backbone)
        code = sys.modules[written_class(self.layers[0]).__module__].__dict__
        reached = (
            "ALL_ATTENTION_FUNCTIONS" in code
            and "eager_attention_forward" in code
            and not getattr(model.config, "reorder_and_upcast_attn", False)
        )
        self.packs = reached if self.spec.rows is None else self.spec.rows == "packed"
        self.whole = self.spec.rows == "whole"
        self.attention = "eager" if model.config._attn_implementation == "eager" else "sdpa"
        self.layer_configs = list(
            {id(m.config): m.config for layer in self.layers for m in layer.modules() if hasattr(m, "config")}.values()
        )

    @property
    def adds_up(self) -> bool:
        """Whether what a down projection says is added to the residual stream as it is, as far as is known."""
        return self.spec.output_norm is self.spec.output_scale is None and self.spec.tail == "parts"

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        """Device of the first edited-layer weight; inputs go there."""
        return self.own_weight(self.editable[0]).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the weights."""
        return self.own_weight(self.editable[0]).dtype

    def check_layer(self, layer: int) -> None:
        """Raise :class:`ArgumentError` unless ``layer`` counts one of the model's layers."""
        if not 0 <= layer < self.n_layers:
            raise ArgumentError(
                f"layer {layer} does not exist: this model has layers 0 to {self.n_layers - 1}; "
                "choose others (the editor's setting layers, or layer)"
            )

    def down_proj(self, layer: int) -> nn.Linear | Conv1D:
        """Return the MLP down projection of a layer.

        Raises:
            ValueError: If the model has no such layer.
            UnknownArchitectureError: If the layer has no such module, or the module is neither Linear nor Conv1D.
        """
        self.check_layer(layer)
        path = self.down_path(layer)
        if path is None:
            raise UnknownArchitectureError(
                f"layer {layer} has no module {self.spec.down_proj!r}{self._others()}{self._meant()}.\n"
                f"{_describe(self.model)}"
            )
        module = self.layers[layer].get_submodule(path)
        if not isinstance(module, (nn.Linear, Conv1D)):
            raise UnknownArchitectureError(
                f"{path!r} of layer {layer} is a {type(module).__name__}; "
                "editing needs torch.nn.Linear or transformers' Conv1D (quantised layers cannot be edited: load the "
                "model in float32 or bfloat16)"
            )
        return module

    def down_path(self, layer: int) -> str | None:
        """Return the path of a layer's down projection within it, or ``None`` where it has none."""
        self.check_layer(layer)
        return self._down_paths[layer]

    def _find_down(self, layer: nn.Module) -> str | None:
        paths = (self.spec.down_proj,) if isinstance(self.spec.down_proj, str) else self.spec.down_proj
        return next((path for path in paths if _has(layer, path)), None)

    def _meant(self) -> str:
        """Name the module of a layer that comes nearest to a path that no layer has."""
        known = [name for name, _ in self.layers[0].named_modules() if name]
        path = self.spec.down_proj if isinstance(self.spec.down_proj, str) else self.spec.down_proj[0]
        return "" if self.editable else did_you_mean(path, known)

    def _others(self) -> str:
        return f" (layers {', '.join(map(str, self.editable))} have)" if self.editable else ""

    def attention_module(self, layer: int) -> nn.Module:
        """Return the attention of a layer: its one module whose class is called so.

        Raises:
            UnknownArchitectureError: If there is none, or more than one.
        """
        self.check_layer(layer)
        found = [m for m in self.layers[layer].modules() if type(m).__name__.endswith("Attention")]
        if len(found) != 1:
            raise UnknownArchitectureError(
                f"layer {layer} has {len(found)} modules whose class ends in 'Attention'; expected one"
            )
        return found[0]

    def output_norm(self, layer: int) -> nn.Module | None:
        """Return what stands between a layer's down projection and the residual stream; mostly nothing does."""
        return self.layers[layer].get_submodule(self.spec.output_norm) if self.spec.output_norm else None

    @property
    def output_scale(self) -> float:
        """What multiplies all that a layer adds to the residual stream."""
        name = self.spec.output_scale
        return 1.0 if name is None else float(getattr(self.model.config.get_text_config(decoder=True), name))

    def own_weight(self, layer: int) -> nn.Parameter:
        """Return the edited parameter of a layer as the model itself holds it."""
        weight = self.down_proj(layer).weight
        assert isinstance(weight, nn.Parameter)  # noqa: S101 - Linear and Conv1D have no other
        return weight

    def weight_name(self, layer: int) -> str:
        """Return the full name of the edited parameter of a layer, as in ``model.named_parameters()``."""
        if (path := self.down_path(layer)) is None:
            self.down_proj(layer)  # raises
        return f"{self.layer_prefix(layer)}{path}.weight"

    def layer_prefix(self, layer: int) -> str:
        """Return what the names of a layer's parameters begin with."""
        return f"{self.spec.layers}.{layer}."

    def _module(self, path: str) -> Any:
        try:
            return self.model.get_submodule(path)
        except AttributeError:
            raise UnknownArchitectureError(
                f"the description of family {self.spec.family!r} names {path!r}, which this "
                f"{type(self.model).__name__} does not have{self._near(path)}.\n{_describe(self.model)}"
            ) from None

    def _near(self, path: str) -> str:
        """Name the module that comes nearest to a path that the model does not have; of layers their list alone."""
        known = [name for name, _ in self.model.named_modules() if not re.search(r"\.\d+(\.|$)", name)]
        return did_you_mean(path, known)

    def _optional(self, path: str | None) -> nn.Module | None:
        if path is None:
            return None
        parent, _, name = path.rpartition(".")
        owner = self._module(parent) if parent else self.model
        return getattr(owner, name) if hasattr(owner, name) else self._module(path)  # OPT's is there, and may be None


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
