"""What a plan must know of a model: read off its shapes, without its weights."""

from __future__ import annotations

from dataclasses import dataclass

from lit_edit.editors.closed_form.engine import ClosedFormEditor
from lit_edit.models.adapter import ModelAdapter


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model. Counts are of numbers, not of bytes."""

    parameters: int  # all of them; shared ones once
    layers: tuple[int, ...]  # parameters of each decoder layer
    matrices: tuple[int, ...]  # those of them that every token is multiplied with
    head: int  # parameters of the head
    vocabulary: int  # tokens
    d_model: int  # width of the residual stream
    queries: int  # width of a token's attention queries; as wide are its outputs
    key_values: int  # width of its attention keys; as wide are its values
    heads: int  # attention heads
    kept: int  # numbers that a layer's MLP keeps of a token for the way back
    edited: tuple[int, ...]  # the edited layers, ascending
    shapes: tuple[tuple[int, int], ...]  # (d_out, d_in) of each edited layer

    @classmethod
    def of(cls, adapter: ModelAdapter, editor: ClosedFormEditor) -> ModelSizes:
        """Read the sizes of a model, which may be on the meta device."""
        config = adapter.model.config.get_text_config()
        edited = tuple(editor.resolve_layers(adapter))
        d_model, d_ff = adapter.shape(adapter.editable[0])
        heads = int(config.num_attention_heads)
        size = int(getattr(config, "head_dim", None) or d_model // heads)
        groups = int(getattr(config, "num_key_value_heads", None) or heads)
        return cls(
            parameters=sum(p.numel() for p in adapter.model.parameters()),
            layers=tuple(sum(p.numel() for p in layer.parameters()) for layer in adapter.layers),
            matrices=tuple(sum(p.numel() for p in layer.parameters() if p.dim() == 2) for layer in adapter.layers),
            head=adapter.head.weight.numel(),
            vocabulary=adapter.head.weight.shape[0],
            d_model=d_model,
            queries=heads * size,
            key_values=groups * size,
            heads=heads,
            kept=_kept(adapter, d_model, d_ff),
            edited=edited,
            shapes=tuple(adapter.shape(layer) for layer in edited),
        )

    @property
    def above(self) -> range:
        """The layers above the edited ones, which targets are fitted through."""
        return range(self.edited[-1] + 1, len(self.layers))

    def squares(self, size: int) -> int:
        """Return the bytes of a matrix ``(d_in, d_in)`` of every edited layer, with numbers of ``size`` bytes."""
        return size * sum(d_in * d_in for _, d_in in self.shapes)

    def wide(self, size: int) -> int:
        """Return the bytes of a matrix ``(d_out, d_in)`` of every edited layer."""
        return size * sum(d_out * d_in for d_out, d_in in self.shapes)

    @property
    def d_in(self) -> int:
        """The widest edited layer's."""
        return max(d_in for _, d_in in self.shapes)

    @property
    def one_wide(self) -> int:
        """Numbers of the largest edited weight."""
        return max(d_out * d_in for d_out, d_in in self.shapes)


def _kept(adapter: ModelAdapter, d_model: int, d_ff: int) -> int:
    """Return what a layer's MLP keeps of a token: a gate, its activation and its partner; or what activations need."""
    layer = adapter.editable[0]
    parent = str(adapter.down_path(layer)).rpartition(".")[0]
    block = adapter.layers[layer].get_submodule(parent) if parent else adapter.layers[layer]
    widths = [p.numel() // d_model for p in block.parameters() if p.dim() == 2 and d_model in p.shape]
    into = sum(width // d_ff for width in widths if width in (d_ff, 2 * d_ff)) - 1  # without the way out
    written = str(getattr(adapter.model.config, "activation_function", "")) == "gelu_new"  # in Python, step by step
    return d_ff * (3 if into > 1 else 4 if written else 1)
