"""Which model answers which prompt."""

from __future__ import annotations

from collections.abc import Sequence

from lit_edit.models.adapter import ModelAdapter


def by_route(adapter: ModelAdapter, prompts: Sequence[str]) -> list[tuple[ModelAdapter, dict[str, str]]]:
    """Return the models that answer some prompts, each with its prompts and what is put before each of them."""
    models: dict[int, tuple[ModelAdapter, dict[str, str]]] = {}
    for prompt, route in zip(prompts, adapter.routes(prompts), strict=True):
        model = route.adapter or adapter
        models.setdefault(id(model), (model, {}))[1][prompt] = route.context
    return list(models.values())
