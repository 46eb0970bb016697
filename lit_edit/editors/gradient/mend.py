r"""MEND (Mitchell et al., arXiv 2110.11309): one backward pass, and a trained network that makes an edit of it.

The gradient of the target's cross entropy, on the current weights, is taken apart into the factors of each token; the
network (:mod:`lit_edit.editors.gradient.mend_network`) maps them to those of a better update, which is added. Nothing
is fitted per edit: what an edit costs is one pass forward and backward (and one to measure it).

The network has to be trained first, for one model, on edits that are not those of the stream
(:mod:`lit_edit.training.mend`)::

    lit-edit fit --config train/mend --data.path counterfact.json --run_name mend

By nature it holds for few edits in a row: it is trained on single edits of the original weights, and each edit here
begins where the earlier ones have left the model. The paper edits several at once by the gradient of their joint loss;
here each edit of a step has a loss of its own and the increments are summed, so that they can be told apart and taken
out one by one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_edit.editors.base import EditorInfo, Moments, Proposal, Status, Step, entry_of
from lit_edit.editors.gradient.mend_network import HOW_TO_TRAIN, MENDNetwork
from lit_edit.editors.increments import FactoredEditor, plus
from lit_edit.editors.lessons import LessonLoss, probabilities, target_lesson
from lit_edit.editors.token_gradients import collect_gradients
from lit_edit.editors.transforms.base import UpdateTransform
from lit_edit.errors import NotHereError
from lit_edit.files.paths import expand
from lit_edit.models.adapter import ModelAdapter
from lit_edit.text.tokens import continuation, pad_token


class MEND(FactoredEditor):
    """Edits by a hyper-network on gradients, trained beforehand; see :mod:`lit_edit.editors.gradient.mend`.

    The layers are those that the network was trained for. It holds for few edits in a row: it was trained on single
    ones.

    Args:
        network: The run folder of ``lit-edit fit --config train/mend``, or the ``network.safetensors`` in it.
        same_weights: Refuse a network that was trained on other weights than the model's original ones. Without, only
            its kind and size are looked at, for a model that has been fine-tuned or edited since.
        transforms: Applied to what is written. The next step goes on from what is written.

    Raises:
        NotHereError: If no network is given; says how to train one.
    """

    about: ClassVar[EditorInfo] = EditorInfo(
        title="MEND",
        paper="Fast Model Editing at Scale, arXiv 2110.11309",
        kind="hyper-network",
        cost="two forward passes and one backward, after a training of minutes to hours for the model",
        state="the weights; on record the tokens' factors, d_in + d_out numbers per token and layer",
        undo="approximate",
        lora=True,
        lacks="long streams: trained on single edits, it holds for few in a row; a network for each model",
    )

    def __init__(
        self, network: str | None = None, same_weights: bool = True, transforms: Sequence[UpdateTransform] = ()
    ) -> None:
        super().__init__(transforms)
        if not network:
            raise NotHereError(
                "MEND needs a trained network (model.editor.init_args.network, a run folder). "
                f"Train one for the model with: {HOW_TO_TRAIN}"
            )
        self.path, self.same_weights = expand(network), same_weights

    # ---- before the stream -------------------------------------------------------------------------------------------

    def resolve_layers(self, adapter: ModelAdapter) -> tuple[int, ...]:
        """Return the layers that the network was trained for; refuse one for another kind or size of model."""
        self.network = MENDNetwork.load(self.path)
        self.network.origin.check_shapes(adapter)
        return self.network.layers

    def _begin(self, moments: Moments, status: Status) -> None:
        """Compare the model with the network's."""
        super()._begin(moments, status)
        if self.same_weights:
            names = self.ledger.names
            self.network.origin.check_weights({layer: self.ledger.base[name] for layer, name in names.items()})
        self.network.to(self.ledger.adapter.device)

    def settings(self) -> dict[str, Any]:
        """Return all settings that a result depends on."""
        return {**super().settings(), "network": self.network.digest}

    # ---- one step ----------------------------------------------------------------------------------------------------

    def _work_out(self, step: Step) -> Proposal:
        watch, adapter = step.watch, self.ledger.adapter
        sums = self._added(self.sums, step.replaced, -1)
        with watch("gradients"):
            rows = [continuation(self.tokenizer, request.text, request.target_new) for request in step.requests]
            model = self._model(sums) if step.replaced else adapter
            found = collect_gradients(model, rows, self.ledger.layers, pad_token(self.tokenizer), everywhere=True)
        record = {"owner": found.owner}
        with watch("network"), torch.no_grad():
            self.network.to(adapter.device)
            for layer in self.ledger.layers:
                place = adapter.device
                factors = self.network(layer, found.inputs[layer].to(place), found.gradients[layer].to(place))
                record[f"inputs.{layer}"], record[f"values.{layer}"] = map(adapter.ranks.same, factors)
        increments = self.increments(record)
        sums = plus(sums, increments, 1)
        with watch("measuring"), torch.no_grad(), adapter.fast_products():
            lessons = [[target_lesson(*row)] for row in rows]
            after = LessonLoss(self._model(sums), lessons, self.ledger.layers[0], pad_token(self.tokenizer))({})
        losses = zip(found.losses.tolist(), after.tolist(), self._sizes(record, len(step.requests)), strict=True)
        facts = [{**probabilities(before, loss), "increment_norm": size} for before, loss, size in losses]
        return self._proposal(sums, step.change(record), tuple(map(entry_of, step.requests, facts)), record)

    def _sizes(self, record: Mapping[str, Tensor], edits: int) -> list[float]:
        """Return the norm of each edit's increment over all layers."""
        sizes = []
        for edit in range(edits):
            own = self._increments(record, [edit])
            sizes.append(math.sqrt(sum(float(increment.square().sum()) for increment in own.values())))
        return sizes

    def product(self, inputs: Tensor, values: Tensor) -> Tensor:
        """Return the increment ``(d_out, d_in)`` that some tokens make."""
        return values.T @ inputs
