"""The check of an architecture that was described by a user, or found: does the model do that, and nothing else?"""

from __future__ import annotations

import torch

from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.families import SPECS
from lit_edit.models.packed import TokenRows
from lit_edit.models.structure import UnknownArchitectureError


def check_if_new(adapter: ModelAdapter) -> None:
    """Check a model that no family file describes (:func:`check_passes`), before anything is done to it."""
    if adapter.spec not in SPECS:
        check_passes(adapter)


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
