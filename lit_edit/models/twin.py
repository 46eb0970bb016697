"""Views of a model for other threads: modules of their own, over the same tensors."""

from __future__ import annotations

import copy
from itertools import chain

from lit_edit.models.adapter import ModelAdapter


def twin(adapter: ModelAdapter) -> ModelAdapter:
    """Return a view whose hooks, borrowed weights and kernels touch no other view; of a whole model without a memory.

    Passes put hooks on modules and lend them other weights for their time, so that two threads cannot share modules.
    Parameters and buffers are shared: a twin takes no memory to speak of, and must not be written to.
    """
    if adapter.sharded or adapter.memory is not None:
        raise ValueError("only a whole model without a memory has twins")
    shared = {id(tensor): tensor for tensor in chain(adapter.model.parameters(), adapter.model.buffers())}
    model = copy.deepcopy(adapter.model, memo=shared)
    view = ModelAdapter(model, adapter.spec, adapter.weights, adapter.products)
    view.rounded_to, view.head_weight = adapter.rounded_to, adapter.head_weight
    view.pin_kernels(adapter.kernels())
    return view
