"""The check of an architecture that was described by a user, or found: does the model do that, and nothing else?"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.families import SPECS
from lit_edit.models.packed import TokenRows
from lit_edit.models.passes import first_of
from lit_edit.models.structure import UnknownArchitectureError

log = logging.getLogger(__name__)


def check_if_new(adapter: ModelAdapter) -> None:
    """Check a model that no family file describes (:func:`check_passes`), before anything is done to it."""
    if adapter.spec not in SPECS:
        check_passes(adapter)
        if not adds_as_described(adapter):
            log.warning(
                "what an MLP of this %s says is not what reaches the residual stream, and the description does not say "
                "what becomes of it (model.language_model.arch: output_norm, output_scale): how strongly edits are "
                "written is a guess; look at which of them hold",
                adapter.spec.family,
            )


@torch.no_grad()
def adds_as_described(adapter: ModelAdapter) -> bool:
    """Tell whether what a down projection says reaches the residual stream as described: tried in one layer."""
    layer, found = adapter.editable[0], list[Tensor]()
    said: list[Tensor] = []
    more = torch.linspace(-1, 1, adapter.shape(layer)[0], device=adapter.device, dtype=adapter.dtype)

    def say_more(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        said.append(out.reshape(-1, out.shape[-1])[-1:])
        return out + more

    hooks = [adapter.layers[layer].register_forward_hook(lambda module, args, out: found.append(first_of(out)[0, -1]))]
    ids = torch.tensor([[1, 2, 3]], device=adapter.device)
    try:
        adapter.last_hidden(ids, torch.ones_like(ids))
        hooks.append(adapter.down_proj(layer).register_forward_hook(say_more))
        adapter.last_hidden(ids, torch.ones_like(ids))
    finally:
        for hook in hooks:
            hook.remove()
    claimed = (adapter.added(layer, said[0] + more) - adapter.added(layer, said[0]))[0]
    return bool((found[1] - found[0] - claimed).norm() < 0.05 * claimed.norm())


@torch.no_grad()
def check_passes(adapter: ModelAdapter) -> None:
    """Compare passes of ours with the model's own; raise :class:`UnknownArchitectureError` if they differ.

    The model then does something that the description does not say.
    """
    words = int(adapter.model.config.get_text_config().vocab_size)
    rows = [[(7 * i + 3 * n + 1) % words for i in range(length)] for n, length in enumerate((9, 5))]
    try:
        line = TokenRows(adapter, rows, pad=0).line()
        logits = adapter.logits(adapter.finish(line.run(line.hidden, 0, adapter.n_layers)))
        error = 0.0
        for number, row in enumerate(rows):
            own = adapter.model(input_ids=torch.tensor([row], device=adapter.device)).logits[0].to(logits)
            ours = logits[[line.index(number, i) for i in range(len(row))]]
            error = max(error, float((ours - own).norm() / own.norm()))
    except (RuntimeError, TypeError, KeyError, AttributeError, IndexError, ValueError) as failure:
        raise UnknownArchitectureError(
            f"a model of family {adapter.spec.family!r} cannot be run layer by layer as described "
            f"({type(failure).__name__}: {str(failure).splitlines()[0]})"
        ) from failure
    if not error < (1e-3 if adapter.dtype in (torch.float32, torch.float64) else 0.1):
        raise UnknownArchitectureError(
            f"run layer by layer as described, a model of family {adapter.spec.family!r} says something else than on "
            f"its own (logits differ by {error:.0%}): it does something between its layers, or behind them, that "
            "model.language_model.arch cannot say. Editing it would go wrong"
        )
