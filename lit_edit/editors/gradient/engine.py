"""The engine of the fine-tuning editors: Adam on the down projections of a few layers, from the current weights on.

What Adam moves is the update itself, relative to the original weights, and a pass adds it to them: for the gradient
that is the same as moving the weight, but no step is lost to the rounding of a weight, whatever its type, and a bound
around the original weights is a bound of the update. Only the edited layers and those above are run with gradients;
what lies below is run once per step of the stream.

No step of Adam is a sum over edits, so what several edits of one step have written cannot be told apart: they are
taken out and put back together.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lit_edit.data.request import EditRequest
from lit_edit.devices.algebra import for_algebra
from lit_edit.devices.host_memory import kept_memory
from lit_edit.editors.base import Deltas, Proposal, Status, Step, described, entry_of
from lit_edit.editors.increments import IncrementEditor, plus
from lit_edit.editors.layer_choice import Published, at_depth, chosen_layers, existing_layers, published_for
from lit_edit.editors.lessons import Lesson, LessonLoss, probabilities
from lit_edit.editors.transforms.base import UpdateTransform
from lit_edit.errors import check_least, check_not_negative, check_positive
from lit_edit.ledger.edit_ledger import EditRefusedError
from lit_edit.models.adapter import ModelAdapter
from lit_edit.text.tokens import pad_token


class Learner:
    """What Adam moves (``parameters``): here all entries of the updates, beginning with ``start``.

    After each step of Adam ``bounded`` is applied to each update.
    """

    def __init__(
        self, start: Deltas, dtype: torch.dtype, device: torch.device, bounded: Callable[[Tensor], Tensor]
    ) -> None:
        self.start, self.bounded = start, bounded
        self.leaves = {n: d.to(device, dtype, copy=True).requires_grad_() for n, d in start.items()}
        self.parameters = list(self.leaves.values())

    def updates(self) -> Deltas:
        """Return the updates as functions of the parameters."""
        return self.leaves

    def penalty(self) -> Tensor | float:
        """Return what is added to the loss."""
        return 0.0

    @torch.no_grad()
    def stepped(self, step: int) -> None:
        """Do what is to be done after a step of Adam, counted from 1."""
        for leaf in self.parameters:
            leaf.copy_(self.bounded(leaf))

    def record(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return what :meth:`GradientEditor.increments` makes the increments of."""
        return {
            f"increment.{n}": (for_algebra(leaf.detach()) - self.start[n]).to(dtype) for n, leaf in self.leaves.items()
        }


class GradientEditor(IncrementEditor):
    """Fine-tune the MLP down projections of a few layers on one step's edits at a time.

    The loss of a step is the mean of the losses of its edits (:class:`LessonLoss`), a new Adam (betas 0.9 and 0.999, no
    weight decay) fits it, from the weights that the step finds. What it has moved is the step's increment; the editor's
    state is the sum of the increments of all steps that hold.

    Args:
        layers: Layers to edit, ascending; by default a published choice, or one at seven tenths of the depth.
        steps: Steps of Adam at most.
        lr: Its learning rate.
        loss_threshold: Stop as soon as the loss is below this: a step on what is known already does harm.
        transforms: Applied to what is written. The next step goes on from what is written.
        keep_increments: Put the increments on record. Without them a long stream on a large model needs no space for
            them, and edits can neither be taken out nor replaced (``on_conflict: average`` leaves the earlier ones in),
            nor a journal taken up (a checkpoint is enough to go on).
    """

    published: ClassVar[Published[tuple[int, ...]]] = {}
    depends_on = "steps lr loss_threshold"
    built_on = "was trained on the weights"

    def __init__(
        self,
        layers: Sequence[int] | None = None,
        steps: int = 25,
        lr: float = 5e-4,
        loss_threshold: float = 1e-2,
        transforms: Sequence[UpdateTransform] = (),
        keep_increments: bool = True,
    ) -> None:
        check_least(1, steps=steps)
        check_positive(lr=lr)
        check_not_negative(loss_threshold=loss_threshold)
        super().__init__(transforms)
        self.layers = chosen_layers(layers)
        self.steps, self.lr, self.loss_threshold = steps, lr, loss_threshold
        self.keep_increments = keep_increments

    # ---- what a method says ------------------------------------------------------------------------------------------

    @abstractmethod
    def lessons(self, request: EditRequest) -> list[Lesson]:
        """Return what the model is taught for an edit."""

    def facts(self, before: float, after: float) -> dict[str, float]:
        """Return what the ledger is to tell of an edit with these losses."""
        return probabilities(before, after)

    def learner(self, start: Deltas) -> Learner:
        """Return what is to be fitted."""
        return Learner(start, self.learning_type, self.ledger.adapter.device, self.bounded)

    def increments(self, record: Mapping[str, Tensor]) -> Deltas:
        """Return what a step has added to the updates, from its record."""
        return {n: for_algebra(self._here(record[f"increment.{n}"])) for n in self.ledger.layers}

    # ---- before the stream -------------------------------------------------------------------------------------------

    def resolve_layers(self, adapter: ModelAdapter) -> tuple[int, ...]:
        """Return the layers to edit: those given, published for the model, or one at seven tenths of the depth."""
        published = published_for(adapter, self.published, (at_depth(adapter, 0.7),))
        return existing_layers(adapter, self.layers or published)

    @property
    def learning_type(self) -> torch.dtype:
        """The type that updates are learnt in: the model's, but not shorter than float32."""
        return torch.promote_types(self.ledger.adapter.dtype, torch.float32)

    # ---- one step ----------------------------------------------------------------------------------------------------

    def _work_out(self, step: Step) -> Proposal:
        """Fit a learner to the edits; refuse one that replaces one of several that were made in one step."""
        if broken := self._broken(step.replaced):
            raise EditRefusedError(
                f"edit {', '.join(repr(r.id) for r in step.requests)} replaces one that was made {broken}: set "
                "model.on_conflict to average (the earlier edits stay, and are trained over), or data.batch_size to 1"
            )
        sums = self._added(self.sums, step.replaced, -1)
        with step.watch("fine-tuning"), self.ledger.adapter.fast_products(), kept_memory():
            learner = self.learner(self._written(sums))
            before, after, steps = self._fit(step.requests, learner, step.status)
        ranks = self.ledger.adapter.ranks
        record = {name: ranks.same(tensor) for name, tensor in learner.record(self.ledger.adapter.dtype).items()}
        increments = self.increments(record)
        size = math.sqrt(sum(float(increment.square().sum()) for increment in increments.values()))
        done = {"steps": float(steps), "increment_norm": size}
        facts = [{**self.facts(b, a), **done} for b, a in zip(before, after, strict=True)]
        change = step.change(record if self.keep_increments else {})
        return self._proposal(plus(sums, increments, 1), change, tuple(map(entry_of, step.requests, facts)), record)

    def _fit(
        self, requests: Sequence[EditRequest], learner: Learner, status: Status
    ) -> tuple[list[float], list[float], int]:
        """Move a learner's parameters; return the losses before and after, and how many steps were taken."""
        what = repr(requests[0].subject) if len(requests) == 1 else f"{len(requests)} edits"
        lessons = [self.lessons(request) for request in requests]
        loss_of = LessonLoss(self.ledger.adapter, lessons, self.ledger.layers[0], pad_token(self.tokenizer))
        adam = torch.optim.Adam(learner.parameters, lr=self.lr)
        before: list[float] = []
        for step in range(self.steps + 1):  # the last one only measures
            with torch.set_grad_enabled(step < self.steps):
                losses = loss_of(self._weights(learner.updates()))
                total = losses.mean() + learner.penalty()
            after = losses.detach().tolist()
            self._refuse_divergence(requests, after, step)
            before, mean = before or after, sum(after) / len(after)
            status(f"fine-tuning on {what}: step {step}/{self.steps}, loss {mean:.3f}")
            if step == self.steps or mean < self.loss_threshold:
                break
            gradients = torch.autograd.grad(total, learner.parameters)  # not backward: the model may ask for gradients
            for parameter, gradient in zip(learner.parameters, gradients, strict=True):
                parameter.grad = gradient
            adam.step()
            learner.stepped(step + 1)
        return before, after, step

    def _weights(self, updates: Deltas) -> dict[str, Tensor]:
        """Return the weights that updates make, with their gradients."""
        adapter, weights = self.ledger.adapter, {}
        for layer, delta in updates.items():
            base = self.ledger.base[self.ledger.names[layer]]
            weights[self.ledger.names[layer]] = (base.to(delta) + adapter.to_layout(layer, delta)).to(base.dtype)
        return weights

    def _refuse_divergence(self, requests: Sequence[EditRequest], losses: Sequence[float], step: int) -> None:
        bad = [request for request, loss in zip(requests, losses, strict=True) if not math.isfinite(loss)]
        if bad:
            raise FloatingPointError(
                f"the fine-tuning of edit {', '.join(map(described, bad))} diverged at step {step}; nothing of it was "
                f"written. Use a smaller learning rate (model.editor.init_args.lr, now {self.lr})"
            )
