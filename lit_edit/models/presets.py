"""Which layers are known to edit well, by model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lit_edit.models.adapter import ModelAdapter

PUBLISHED: dict[tuple[str, int, int], tuple[int, ...]] = {
    # (model type, layers, hidden size): edited layers
    ("llama", 30, 576): (6, 7, 8, 9, 10),  # SmolLM2-135M, measured: see configs/method/d4s.yaml
    ("gpt2", 48, 1600): (13, 14, 15, 16, 17),  # GPT2-XL, MEMIT
    ("gptj", 28, 4096): (3, 4, 5, 6, 7, 8),  # GPT-J-6B, MEMIT
    ("llama", 32, 4096): (4, 5, 6, 7, 8),  # Llama-2-7B, Llama-3-8B, EasyEdit and AlphaEdit
    ("mistral", 32, 4096): (4, 5, 6, 7, 8),  # Mistral-7B, EasyEdit
    ("llama", 28, 3072): (4, 5, 6, 7, 8),  # Llama-3.2-3B, EasyEdit
    ("qwen2", 28, 3584): (4, 5, 6, 7, 8),  # Qwen2.5-7B, EasyEdit
}


PUBLISHED_SINGLE: dict[tuple[str, int, int], int] = {
    # for methods that edit one layer (ROME)
    ("llama", 30, 576): 8,
    ("gpt2", 48, 1600): 17,
    ("gptj", 28, 4096): 5,
    ("llama", 32, 4096): 5,
    ("mistral", 32, 4096): 5,
    ("llama", 28, 3072): 5,
    ("qwen2", 28, 3584): 5,
}


def edit_layer(adapter: ModelAdapter) -> int:
    """Return the layer to edit when a method edits one and the user names none: by default the middle of the group."""
    layers = edit_layers(adapter)
    return PUBLISHED_SINGLE.get(key_of(adapter), layers[len(layers) // 2])


def edit_layers(adapter: ModelAdapter) -> tuple[int, ...]:
    """Return the layers to edit when the user names none.

    Models that nobody has tuned get the layers from an eighth to a third of the depth, where the published choices lie.
    """
    key = key_of(adapter)
    if key in PUBLISHED:
        return PUBLISHED[key]
    depth = adapter.n_layers
    last = min(depth - 1, max(1, round(depth * 0.3)))
    chosen = [layer for layer in adapter.editable if layer <= last] or adapter.editable[:1]  # some have no MLP
    return tuple(chosen[-5:])


def key_of(adapter: ModelAdapter) -> tuple[str, int, int]:
    """Return what layers are published by: model type, number of layers, width of the residual stream."""
    return adapter.model.config.model_type, adapter.n_layers, adapter.shape(adapter.editable[0])[0]
