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
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lit_edit.data.request import EditRequest, shorten
from lit_edit.devices import algebra_device, for_algebra
from lit_edit.editors.base import Editor, Proposal, Status, Stopwatch, silent
from lit_edit.editors.layer_choice import chosen_layers, existing_layers
from lit_edit.editors.lessons import Lesson, LessonLoss
from lit_edit.editors.transforms import UpdateTransform, transformed
from lit_edit.errors import ArgumentError
from lit_edit.ledger import Change, EditLedger, EditRefusedError, LayerUpdate, LedgerEntry, RecordedFacts
from lit_edit.memory import kept_memory
from lit_edit.tokens import check_tokenizer, pad_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lit_edit.models.adapter import ModelAdapter
    from lit_edit.stats.second_moment import KeyStatistics

Deltas = dict[int, Tensor]
"""Updates by layer, each ``(d_out, d_in)``."""


class Learner:
    """What Adam moves: here all entries of the updates.

    Args:
        start: The updates to begin with.
        dtype: Type to learn in.
        device: Where.

    Attributes:
        parameters: The leaves.
    """

    def __init__(self, start: Deltas, dtype: torch.dtype, device: torch.device) -> None:
        self.start = start
        self.leaves = {n: d.to(device, dtype, copy=True).requires_grad_() for n, d in start.items()}
        self.parameters = list(self.leaves.values())

    def updates(self) -> Deltas:
        """Return the updates as functions of the parameters."""
        return self.leaves

    def penalty(self) -> Tensor | float:
        """Return what is added to the loss."""
        return 0.0

    def stepped(self, step: int) -> None:
        """Do what is to be done after a step of Adam, counted from 1."""

    def record(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return what :meth:`GradientEditor.increments` makes the increments of."""
        moved = {n: (for_algebra(leaf.detach()) - self.start[n]).to(dtype) for n, leaf in self.leaves.items()}
        return {f"increment.{layer}": increment for layer, increment in moved.items()}


class GradientEditor(Editor):
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

    published: ClassVar[Mapping[tuple[str, int, int], tuple[int, ...]]] = {}
    """Layers by model type, number of layers and hidden size."""

    def __init__(
        self,
        layers: Sequence[int] | None = None,
        steps: int = 25,
        lr: float = 5e-4,
        loss_threshold: float = 1e-2,
        transforms: Sequence[UpdateTransform] = (),
        keep_increments: bool = True,
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if not 0 < lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {lr}")
        if not 0 <= loss_threshold < math.inf:
            raise ValueError(f"loss_threshold must not be negative or infinite, got {loss_threshold}")
        self.layers = chosen_layers(layers)
        self.steps, self.lr, self.loss_threshold = steps, lr, loss_threshold
        self.transforms, self.keep_increments = tuple(transforms), keep_increments
        self.sums: Deltas = {}

    # ---- what a method says ------------------------------------------------------------------------------------------

    @abstractmethod
    def lessons(self, request: EditRequest) -> list[Lesson]:
        """Return what the model is taught for an edit."""

    def facts(self, before: float, after: float) -> dict[str, float]:
        """Return what the ledger is to tell of an edit with these losses."""
        return {
            "target_probability_before": math.exp(-before),
            "target_probability": math.exp(-after),
            "target_loss": after,
        }

    def bounded(self, delta: Tensor) -> Tensor:
        """Return the update nearest to one ``(d_out, d_in)`` that the method allows."""
        return delta

    def learner(self, start: Deltas) -> Learner:
        """Return what is to be fitted, beginning with the updates ``start``."""
        return Learner(start, self.learning_type, self.ledger.adapter.device)

    def increments(self, record: Mapping[str, Tensor]) -> Deltas:
        """Return what a step has added to the updates, from its record."""
        return {n: for_algebra(self._here(record[f"increment.{n}"])) for n in self.ledger.layers}

    def remember(self, record: Mapping[str, Tensor]) -> None:
        """Take in what the next step needs of the record of this one; an empty one: as in the beginning."""

    # ---- before the stream -------------------------------------------------------------------------------------------

    def resolve_layers(self, adapter: ModelAdapter) -> tuple[int, ...]:
        """Return the layers to edit: those given, published for the model, or one at seven tenths of the depth."""
        key = (adapter.model.config.model_type, adapter.n_layers, adapter.shape(0)[0])
        return existing_layers(adapter, self.layers or self.published.get(key) or (int(0.7 * adapter.n_layers),))

    def prepare(
        self,
        ledger: EditLedger,
        tokenizer: PreTrainedTokenizerBase,
        statistics: KeyStatistics | Mapping[int, Tensor],
        status: Status = silent,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Take the ledger; nothing is computed, and no statistics are needed."""
        check_tokenizer(tokenizer)
        if ledger.adapter.sharded:
            raise ArgumentError(
                f"{type(self).__name__} needs whole layers, and each process holds a part of them: use another "
                "strategy (trainer.strategy)"
            )
        self.ledger, self.tokenizer = ledger, tokenizer
        self.sums = {}
        self.remember({})

    def settings(self) -> dict[str, Any]:
        """Return all settings that a result depends on."""
        return {
            **super().settings(),
            "layers": list(self.ledger.layers),
            "steps": self.steps,
            "lr": self.lr,
            "loss_threshold": self.loss_threshold,
            "transforms": [transform.settings() for transform in self.transforms],
        }

    @property
    def learning_type(self) -> torch.dtype:
        """The type that updates are learnt in: the model's, but not shorter than float32."""
        return torch.promote_types(self.ledger.adapter.dtype, torch.float32)

    # ---- one step ----------------------------------------------------------------------------------------------------

    def propose(
        self,
        requests: Sequence[EditRequest],
        window: Sequence[EditRequest] = (),
        status: Status = silent,
        replaced: Sequence[RecordedFacts] = (),
    ) -> Proposal:
        """Work out the updates for some requests; see :meth:`Editor.propose`.

        Raises:
            EditRefusedError: If an edit replaces one of several that were made in one step.
        """
        if broken := self._broken(replaced):
            raise EditRefusedError(
                f"edit {', '.join(repr(r.id) for r in requests)} replaces one that was made {broken}: set "
                "model.on_conflict to average (the earlier edits stay, and are trained over), or data.batch_size to 1"
            )
        watch = Stopwatch()
        sums = self._added(self.sums, replaced, -1)
        with watch("fine-tuning"), self.ledger.adapter.fast_products(), kept_memory():
            learner = self.learner(self._written(sums))
            before, after, steps = self._fit(requests, learner, status)
        ranks = self.ledger.adapter.ranks
        record = {name: ranks.same(tensor) for name, tensor in learner.record(self.ledger.adapter.dtype).items()}
        increments = self.increments(record)
        size = math.sqrt(sum(float(increment.square().sum()) for increment in increments.values()))
        done = {"steps": float(steps), "increment_norm": size}
        entries = tuple(
            LedgerEntry(r.id, r.subject, r.text, r.target_new, {**self.facts(b, a), **done}, r.as_dict())
            for r, b, a in zip(requests, before, after, strict=True)
        )
        numbers = tuple(number for recorded in replaced for number in recorded.numbers)
        change = Change(removed=numbers, tensors=record if self.keep_increments else {})
        return self._proposal(_plus(sums, increments, 1), change, entries, record, tuple(requests), watch.seconds)

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
            named = ", ".join(f"{r.id!r} ({shorten(r.text)!r} -> {shorten(r.target_new)!r})" for r in bad)
            raise FloatingPointError(
                f"the fine-tuning of edit {named} diverged at step {step}; nothing of it was written. Use a smaller "
                f"learning rate (model.editor.init_args.lr, now {self.lr})"
            )

    # ---- what is written ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _written(self, sums: Deltas) -> Deltas:
        """Return what is written for sums of increments: bounded, and transformed."""
        updates = {}
        for layer in self.ledger.layers:
            adapter, base = self.ledger.adapter, self.ledger.base[self.ledger.names[layer]]
            if layer in sums:
                delta = self.bounded(sums[layer])
                if self.transforms:
                    own = for_algebra(adapter.to_layout(layer, base))  # a transpose is its own inverse
                    delta = transformed(delta, own, self.transforms)
            else:
                delta = for_algebra(base.new_zeros(adapter.shape(layer)))
            updates[layer] = delta
        return updates

    def _proposal(
        self,
        sums: Deltas,
        change: Change,
        entries: tuple[LedgerEntry, ...] = (),
        record: Mapping[str, Tensor] | None = None,
        requests: tuple[EditRequest, ...] = (),
        seconds: Mapping[str, float] | None = None,
    ) -> Proposal:
        if not entries and not change.restored and {e.number for e in self.ledger.entries} <= set(change.removed):
            sums, record = {}, {}  # nothing holds: as in the beginning, to the last bit
        written = self._written(sums)
        updates = tuple(LayerUpdate(layer, self.ledger.names[layer], delta) for layer, delta in written.items())
        return Proposal(requests, updates, entries, (sums, record), seconds or {}, change)

    def accept(self, proposal: Proposal) -> None:
        """Take in the sums that are now written."""
        self.sums, record = proposal.pending
        if record is not None:
            self.remember(record)

    # ---- taking out, putting back, doing again -----------------------------------------------------------------------

    def replay(self, change: Change, entries: Sequence[LedgerEntry], old: Sequence[RecordedFacts]) -> Proposal | None:
        """Do again what is on record; see :meth:`Editor.replay`."""
        if entries and not change.tensors:
            return None
        sums = self._added(self.sums, old, 1 if change.restored else -1)
        if not entries:
            return self._proposal(sums, change)
        record = {name: self._here(tensor) for name, tensor in change.tensors.items()}
        return self._proposal(_plus(sums, self.increments(record), 1), change, tuple(entries), record)

    def retract(self, facts: Sequence[RecordedFacts], reason: str = "", exact: bool = False) -> Proposal:
        """Subtract what some steps have added; see :meth:`Editor.retract`.

        The later steps stay as they are, though they began where the retracted ones ended.

        Raises:
            ArgumentError: If ``exact``, or if some of the edits were made in one step with others.
        """
        if exact:
            raise ArgumentError(
                f"{type(self).__name__} cannot take edits out exactly: each step was trained on the weights that the "
                "earlier ones left. Leave exact out to subtract what they added, or run the stream again without them"
            )
        self._check_whole(facts, "taken out")
        change = Change("undo", removed=_numbers(facts), reason=reason)
        return self._proposal(self._added(self.sums, facts, -1), change)

    def reinstate(self, facts: Sequence[RecordedFacts]) -> Proposal:
        """Add what some steps had added; see :meth:`Editor.reinstate`.

        Raises:
            ArgumentError: If some of the edits were made in one step with others.
        """
        self._check_whole(facts, "put back")
        return self._proposal(self._added(self.sums, facts, 1), Change("redo", restored=_numbers(facts)))

    def _check_whole(self, facts: Sequence[RecordedFacts], done: str) -> None:
        if broken := self._broken(facts):
            raise ArgumentError(
                f"these edits cannot be {done} alone: one was made {broken}, and what each has changed cannot be told "
                f"apart. Name all edits of the step"
            )

    def _broken(self, facts: Sequence[RecordedFacts]) -> str:
        """Say which edits of a step are missing among some, or nothing."""
        for recorded in facts:
            missing = sorted(set(self.ledger.history.beside(recorded.numbers[0])) - set(recorded.numbers))
            if missing:
                return f"in one step with edit {', '.join(map(str, missing))}"
        return ""

    def _added(self, sums: Deltas, facts: Iterable[RecordedFacts], sign: int) -> Deltas:
        """Return the sums with the increments of some steps added or subtracted."""
        for recorded in facts:
            sums = _plus(sums, self.increments({n: self._here(t) for n, t in recorded.tensors.items()}), sign)
        return sums

    def _here(self, tensor: Tensor) -> Tensor:
        """Bring a recorded tensor to where the algebra is done."""
        return tensor.to(algebra_device(self.ledger.adapter.device))

    # ---- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of the increments."""
        return {"editor": type(self).__name__, "sums": {str(layer): delta for layer, delta in self.sums.items()}}

    def check_state(self, state: Mapping[str, Any], layers: Sequence[int]) -> None:
        """Raise :class:`ArgumentError` if a saved state is of other layers or another method."""
        if state.get("editor") != type(self).__name__:
            raise ArgumentError(
                f"the checkpoint was made by {state.get('editor', 'another editing method')}, this editor is "
                f"{type(self).__name__}; use the config that it was made with"
            )
        saved = sorted(map(int, state["sums"]))
        if saved and saved != sorted(layers):
            raise ArgumentError(
                f"the checkpoint edits layers {saved}, this editor {sorted(layers)}; use the config that the "
                "checkpoint was made with"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the sums on a prepared editor."""
        self.check_state(state, self.ledger.layers)
        self.sums = {int(layer): self._here(delta).clone() for layer, delta in state["sums"].items()}


def _plus(sums: Deltas, increments: Deltas, sign: int) -> Deltas:
    if not sums:
        return {layer: sign * increment for layer, increment in increments.items()}
    return {layer: sums[layer].to(increment.device) + sign * increment for layer, increment in increments.items()}


def _numbers(facts: Sequence[RecordedFacts]) -> tuple[int, ...]:
    return tuple(sorted(number for recorded in facts for number in recorded.numbers))
