"""What tracing hooks into a model: clean outputs noted and put back, and products that are left out or rounded once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_edit.models.adapter import ModelAdapter


def _module(adapter: ModelAdapter, kind: str, layer: int) -> nn.Module:
    """Return the module whose output is restored; an MLP's output is that of its down projection."""
    return adapter.down_proj(layer) if kind == "mlp" else adapter.attention_module(layer)


def _states_of(output: Any) -> Tensor:
    """Return the states among what a module gives: attentions give weights as well."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _in_place(states: Tensor, output: Any) -> Any:
    """Return what a module gives with other states in it."""
    return (states, *output[1:]) if isinstance(output, tuple) else states


@contextmanager
def reading(adapter: ModelAdapter, layer: int, outputs: Mapping[str, dict[int, Tensor]], length: int) -> Iterator[None]:
    """Note what the modules of a layer give in the first version of a line."""

    def note(module: nn.Module, args: tuple[Any, ...], output: Any, found: dict[int, Tensor]) -> None:
        first = _states_of(output)
        found[layer] = first.reshape(-1, first.shape[-1])[:length]

    with ExitStack() as stack:
        for kind, found in outputs.items():
            stack.enter_context(_module(adapter, kind, layer).register_forward_hook(partial(note, found=found)))
        yield


@contextmanager
def restoring(
    adapter: ModelAdapter, kind: str, layer: int, places: Tensor, clean: Tensor, only: Tensor | None = None
) -> Iterator[None]:
    """Let the modules of a kind give clean outputs ``(places, d_model)`` at some places of the line.

    ``only`` are the places at which MLPs are run, if not at all (:func:`only_at`).
    """
    if only is not None and kind == "mlp" and _mlp(adapter, layer) is not None:
        among = torch.full((int(torch.cat([places, only]).max()) + 1,), -1, device=places.device)
        among[only] = torch.arange(len(only), device=places.device)
        run = among[places] >= 0
        places, clean = among[places][run], clean[run]

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        first = _states_of(output)
        mended = first.reshape(-1, first.shape[-1]).index_copy(0, places, clean.to(first)).view_as(first)
        return _in_place(mended, output)

    with _module(adapter, kind, layer).register_forward_hook(hook):
        yield


def _mlp(adapter: ModelAdapter, layer: int) -> nn.Module | None:
    """Return the module that holds a layer's MLP and nothing else, if there is one."""
    path = (adapter.down_path(layer) or "").rpartition(".")[0]
    return adapter.layers[layer].get_submodule(path) if path and adapter.packs else None


@contextmanager
def only_at(adapter: ModelAdapter, layer: int, places: Tensor | None) -> Iterator[None]:
    """Run a layer's MLP at some places of the line only; what it would add to the others is left out.

    The last layer's output is read at the last tokens alone, and an MLP looks at one token at a time.
    """
    module = _mlp(adapter, layer)
    if places is None or module is None:
        yield
        return
    shape: list[torch.Size] = []

    def choose(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        shape.append(args[0].shape)
        return args[0][:, places], *args[1:]

    def spread(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        first = _states_of(output)
        whole = first.new_zeros(shape.pop()).index_copy(1, places, first)
        return _in_place(whole, output)

    with module.register_forward_pre_hook(choose), module.register_forward_hook(spread):
        yield


@contextmanager
def rounding_once(adapter: ModelAdapter) -> Iterator[None]:
    """Round what enters attentions and MLPs before they see it, where products are rounded anyway.

    Left to autocast, each of the matrices that read it (of queries, keys and values; gate and up) rounds it anew.
    """
    if adapter.rounded_to is None:
        yield
        return

    def round_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (args[0].to(adapter.rounded_to), *args[1:]), kwargs
        if "hidden_states" in kwargs:
            return args, kwargs | {"hidden_states": kwargs["hidden_states"].to(adapter.rounded_to)}
        return None

    with ExitStack() as stack:
        for layer in range(adapter.n_layers):
            for module in (adapter.attention_module(layer), _mlp(adapter, layer)):
                if module is not None:
                    stack.enter_context(module.register_forward_pre_hook(round_input, with_kwargs=True))
        yield
