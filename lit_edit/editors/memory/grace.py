r"""GRACE: a codebook behind one layer (2211.11031).

Each edit is an entry (key :math:`k_i`, value :math:`v_i`, radius :math:`\epsilon_i`). The key is what the layer's down
projection gets at the last token of the edit's prompt; where a key :math:`k` lies within the radius of the nearest
entry, its value takes the place of what the layer says (algorithm 1, eq. 1):

.. math::
    h(k) = \begin{cases} v_{i^*} & \lVert k - k_{i^*} \rVert \le \epsilon_{i^*}, \quad
    i^* = \arg\min_i \lVert k - k_i \rVert \\ W k & \text{otherwise.} \end{cases}

A value is fitted by Adam until the model says the target. A new entry near an old one of the same target widens the old
one's radius; of another target, both get half the distance.

Published code looks keys up at one token of a row, the last of the prompt, which it has to be told, and compares
targets by the mean of their token ids. Here every token is looked up by itself, so that the model needs to be told
nothing, remains causal, and answers alike in any batch; targets are compared as they are. A value is fitted for every
edit, also within the radius of an entry that says the same: taking that one out then takes nothing from this one.

By nature GRACE does not generalise: another wording has another key, beyond any radius that spares other prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lit_edit.data.request import EditRequest
from lit_edit.devices.algebra import for_algebra
from lit_edit.editors.base import EditorInfo, Status, described
from lit_edit.editors.layer_choice import Published, at_depth, published_for
from lit_edit.editors.lessons import LessonLoss, probabilities, target_lesson
from lit_edit.editors.memory.engine import Kept, Learnt, MemoryEditor
from lit_edit.errors import check_least, check_not_negative, check_one_of, check_positive
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.memory import Memory, Patch
from lit_edit.text.tokens import continuation, pad_token


@dataclass(frozen=True)
class Entry:
    """An entry of the codebook: where a key ``(d_in,)`` is within the radius, the value ``(d_out,)`` is said.

    The radius is Euclidean, in the space of keys; ``label`` is what the value makes the model say.
    """

    key: Tensor
    value: Tensor
    radius: float
    label: str


def add_entry(entries: Sequence[Entry], new: Entry) -> list[Entry]:
    """Return a codebook with one more edit, which has the radius of an entry that stands alone (GRACE, algorithm 1).

    Entries within its reach, and it itself then, get other radii.

    Example:
        >>> at = lambda x, label: Entry(torch.tensor([x]), torch.zeros(1), 1.0, label)
        >>> book = add_entry(add_entry([], at(0.0, "Rome")), at(1.5, "Rome"))
        >>> [entry.radius for entry in book]
        [1.5, 1.0]
        >>> [entry.radius for entry in add_entry([at(0.0, "Rome")], at(1.5, "Oslo"))]
        [0.75, 0.75]
    """
    if not entries:
        return [new]
    distances = torch.linalg.vector_norm(torch.stack([entry.key for entry in entries]) - new.key, dim=1)
    nearest = int(distances.argmin())
    distance, old = float(distances[nearest]), entries[nearest]
    if distance > old.radius + new.radius:
        return [*entries, new]
    if old.label == new.label:
        widened = Entry(old.key, old.value, max(old.radius, distance), old.label)
        return [*entries[:nearest], widened, *entries[nearest + 1 :], new]
    half = distance / 2
    halved = Entry(old.key, old.value, min(old.radius, half), old.label)
    return [*entries[:nearest], halved, *entries[nearest + 1 :], Entry(new.key, new.value, half, new.label)]


class Codebook(Memory):
    """Entries behind the down projection of a layer."""

    def __init__(self, layer: int, entries: Sequence[Entry] = ()) -> None:
        self.layer, self.entries = layer, list(entries)
        if entries:
            self.keys = torch.stack([entry.key for entry in entries])
            self.values = torch.stack([entry.value for entry in entries])
            self._exact = for_algebra(self.keys)
            self.radii = torch.tensor([entry.radius for entry in entries])

    def patches(self) -> Mapping[int, Patch]:
        """Return the look-up behind the layer."""
        return {self.layer: self._look_up} if self.entries else {}

    def _look_up(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        # In float64: what cdist computes by products has round-off like the keys' length.
        asked = for_algebra(inputs.detach().reshape(-1, inputs.shape[-1]))
        distances = torch.cdist(asked, self._exact.to(asked.device))
        # A key is recomputed in passes of other shapes: that much is no distance.
        same = 1e-4 * torch.linalg.vector_norm(asked, dim=1)
        # Of entries at equal distance the newest is meant.
        near = distances <= distances.min(1, keepdim=True).values + same[:, None]
        nearest = torch.where(near, torch.arange(near.shape[1], device=near.device), -1).max(1).values
        distance = distances.gather(1, nearest[:, None])[:, 0]
        nearest, distance, same = (found.to(inputs.device) for found in (nearest, distance, same))
        hit = distance <= self.radii.to(inputs.device)[nearest] + same
        values = self.values.to(inputs.device, outputs.dtype)[nearest]
        return torch.where(hit[:, None], values, outputs.reshape(len(asked), -1)).reshape(outputs.shape)


class GRACE(MemoryEditor):
    """Keep each edit as an entry of a codebook behind one layer; see :mod:`lit_edit.editors.memory.grace`.

    Args:
        layer: The layer; by default a published one, or one at 85 % of the depth.
        radius: Of an entry that stands alone, in the space of keys. What is near depends on the model.
        steps: Steps of Adam for a value, at most.
        lr: Its learning rate.
        loss_threshold: Stop as soon as the loss of the target is below this.
        start: A value begins as what the layer says (``warm``) or at random in [0, 1), as published (``cold``).
        seed: Of that.
    """

    about: ClassVar[EditorInfo] = EditorInfo(
        title="GRACE",
        paper="Aging with GRACE, 2211.11031",
        kind="memory",
        cost="steps x passes of the layers above the codebook",
        state="a key, a value and a radius per edit; every token is compared with all keys",
        undo="exact",
        lacks="does not generalise: other wordings keep their old answer; leaves no model to export",
    )
    published: ClassVar[Published[int]] = {
        ("gpt2", 48, 1600): 35,  # GPT2-XL, EasyEdit, as those below
        ("gptj", 28, 4096): 25,
        ("llama", 32, 4096): 27,  # Llama-2-7B
        ("qwen2", 28, 3584): 18,  # Qwen2.5-7B
    }

    depends_on = "radius steps lr loss_threshold start seed"

    def __init__(
        self,
        layer: int | None = None,
        radius: float = 1.0,
        steps: int = 100,
        lr: float = 1.0,
        loss_threshold: float = 1e-2,
        start: Literal["warm", "cold"] = "cold",
        seed: int = 0,
    ) -> None:
        check_least(0, layer=layer)
        check_not_negative(loss_threshold=loss_threshold)
        check_positive(radius=radius, lr=lr)
        check_least(1, steps=steps)
        check_one_of(("warm", "cold"), start=start)
        self.layer, self.radius, self.steps, self.lr = layer, radius, steps, lr
        self.loss_threshold, self.start, self.seed = loss_threshold, start, seed
        self._made: tuple[tuple[Kept, ...], list[Entry]] = ((), [])  # the last codebook, and of what

    def resolve_layers(self, adapter: ModelAdapter) -> tuple[int, ...]:
        """Return no layers to write; check the one behind which the codebook stands."""
        default = published_for(adapter, self.published, at_depth(adapter, 0.85))
        self.place = default if self.layer is None else self.layer
        adapter.check_layer(self.place)
        return ()

    def settings(self) -> dict[str, Any]:
        """Return all settings that a result depends on."""
        return {**super().settings(), "layer": self.place}

    def memory_of(self, kept: Sequence[Kept]) -> Codebook:
        """Return the codebook of some edits, made one after another."""
        begun, entries = self._made
        if len(begun) > len(kept) or any(a is not b for a, b in zip(begun, kept, strict=False)):
            begun, entries = (), []
        for edit in kept[len(begun) :]:  # a stream goes on from what it has: all anew each time would be quadratic
            label = edit.entry.target_new.strip()
            entries = add_entry(entries, Entry(edit.tensors["key"], edit.tensors["value"], self.radius, label))
        self._made = (tuple(kept), entries)
        return Codebook(self.place, entries)

    def learn(self, requests: Sequence[EditRequest], kept: Sequence[Kept], status: Status) -> list[Learnt]:
        """Return each edit's key and value, which depend on no other edit."""
        with self.ledger.adapter.fast_products():
            return [self._learn(request, status) for request in requests]

    def _learn(self, request: EditRequest, status: Status) -> Learnt:
        adapter = self.ledger.original()
        prompt, target = continuation(self.tokenizer, request.text, request.target_new)
        loss_of = LessonLoss(adapter, [[target_lesson(prompt, target)]], self.place, pad_token(self.tokenizer))
        key, said = self._read(loss_of, len(prompt) - 1)
        if self.start == "cold":
            said = torch.rand(said.shape, generator=torch.Generator().manual_seed(self.seed)).to(said)
        value = said.clone().requires_grad_()
        before = self._loss(loss_of, Codebook(self.place)).item()
        adam = torch.optim.Adam([value], lr=self.lr)
        best, found = math.inf, value.detach().clone()
        for step in range(self.steps + 1):  # the last one only measures
            with torch.set_grad_enabled(step < self.steps):
                loss = self._loss(loss_of, Codebook(self.place, [Entry(key, value, 0.0, "")]))
            if not math.isfinite(loss.item()):
                raise FloatingPointError(
                    f"the value of edit {described(request)} diverged at step {step}; nothing was kept. Use a smaller "
                    f"lr (now {self.lr})"
                )
            if loss.item() < best:
                best, found = loss.item(), value.detach().clone()
            status(f"fitting the value of {request.subject!r}: step {step}/{self.steps}, loss {loss.item():.3f}")
            if step == self.steps or best < self.loss_threshold:
                break
            (value.grad,) = torch.autograd.grad(loss, [value])
            adam.step()
        return Learnt({"key": key, "value": found}, {**probabilities(before, best), "steps": float(step)})

    @staticmethod
    def _loss(loss_of: LessonLoss, memory: Memory) -> Tensor:
        return loss_of({}, memory)[0]

    def _read(self, loss_of: LessonLoss, last: int) -> tuple[Tensor, Tensor]:
        """Return what the down projection gets and says at a token of the row, in float32 at least."""
        line = loss_of.line
        keys: dict[int, Tensor] = {}
        with torch.no_grad():
            line.run(loss_of.hidden, self.place, self.place + 1, keys=keys)
            key = keys[self.place][line.index(0, last)]
            said = self.ledger.original().project(self.place, key[None])[0]
        dtype = torch.promote_types(key.dtype, torch.float32)
        return key.to(dtype), said.to(dtype)
