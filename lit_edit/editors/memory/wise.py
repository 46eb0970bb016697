r"""WISE: side memories behind one layer, and a router (2405.14768).

A side memory is a copy :math:`W'` of the down projection :math:`W` of one layer, and training changes it alone. A token
whose key :math:`k` moves it by much is answered by it (eq. 2, 4):

.. math::
    h(k) = \begin{cases} W' k & a(k) > \epsilon \\ W k & \text{otherwise,} \end{cases}
    \qquad a(k) = \lVert (W' - W) k \rVert .

An edit is a few steps of gradient descent on cross entropy at the tokens that predict its target, and on margins
(eq. 3) that keep apart what moves keys of edits and those of other text. It moves a random part of :math:`W'`, the same
for ``save_freq`` edits in a row: a shard. The shards of ``merge_freq`` edits are merged into one memory by TIES.

Published code takes one route for a whole batch, by its mean activation, so that an answer depends on what else is in
the batch. Here every token takes its own: the model is told nothing, remains causal, and answers alike in any batch.
Its margins are of mean activations too; here they are of tokens. It compares with the smallest activation that an edit
had when it was made; here with what the edits that hold have now, which later edits and merging have changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lit_edit.data.request import EditRequest
from lit_edit.data.sources import builtin_text
from lit_edit.editors.base import EditorInfo, Status, described
from lit_edit.editors.layer_choice import Published, at_depth, published_for
from lit_edit.editors.lessons import LessonLoss, probabilities, target_lesson
from lit_edit.editors.memory.engine import Kept, Learnt, MemoryEditor
from lit_edit.editors.memory.side_memories import (
    SideMemories,
    SoleMemory,
    activations,
    margin_loss,
    mask_indices,
    masked_step,
    ties_merge,
)
from lit_edit.errors import check_least, check_not_negative, check_one_of, check_positive
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.packed import TokenRows
from lit_edit.text.tokens import continuation, encode, pad_token


class WISE(MemoryEditor):
    """Train side memories behind one layer, and a router; see :mod:`lit_edit.editors.memory.wise`.

    Args:
        layer: The layer; by default a published one, or one at 85 % of the depth.
        margins: Of activations: of other text at most the first, of edits at least the second, between them the third
            (alpha, beta, gamma); by default published ones. They are lengths: what fits depends on the model.
        steps: Steps of gradient descent for an edit, at most.
        lr: Their length.
        loss_threshold: Stop as soon as cross entropy is below this, and no other text has activations like the edit's.
        bound: No entry of a side memory is farther from the weight than this.
        ratio: Share of the entries that a shard may move.
        act_ratio: A side memory answers above this part of the smallest activation of its edits.
        save_freq: Edits of a shard.
        merge_freq: Edits after which shards are merged: a multiple of ``save_freq``.
        density: Share of the entries of a shard that merging keeps.
        memories: Whether each ``merge_freq`` edits are a memory of their own (``retrieve``), or all are merged into one
            (``merge``).
        contexts: An edit is taught plain, and behind this many sentences, at most 40, that have nothing to do with it.
        seed: Of the shards' random entries.
    """

    about: ClassVar[EditorInfo] = EditorInfo(
        title="WISE",
        paper="WISE, 2405.14768",
        kind="memory",
        cost="steps x passes of the layers above the side memory",
        state="side memories, each as large as the layer's weight; on record, a share (ratio) of it per edit",
        undo="approximate",
        lacks="a model to export",
    )
    published: ClassVar[Published[tuple[int, tuple[float, float, float]]]] = {
        ("gptj", 28, 4096): (21, (15.0, 40.0, 20.0)),
        ("llama", 32, 4096): (27, (5.0, 20.0, 10.0)),  # Llama-2-7B
        ("mistral", 32, 4096): (27, (5.0, 20.0, 10.0)),
        ("qwen2", 28, 3584): (23, (5.0, 20.0, 10.0)),  # Qwen2.5-7B
    }
    """Layer and margins."""
    depends_on = (
        "alpha beta gamma steps lr loss_threshold bound ratio act_ratio save_freq merge_freq density memories "
        "contexts seed"
    )
    built_on = "was trained on the side memory"

    def __init__(
        self,
        layer: int | None = None,
        margins: Sequence[float] | None = None,
        steps: int = 70,
        lr: float = 1.0,
        loss_threshold: float = 0.05,
        bound: float = 1.0,
        ratio: float = 0.2,
        act_ratio: float = 0.88,
        save_freq: int = 500,
        merge_freq: int = 1000,
        density: float = 0.53,
        memories: Literal["retrieve", "merge"] = "retrieve",
        contexts: int = 3,
        seed: int = 0,
    ) -> None:
        check_least(0, layer=layer, contexts=contexts)
        if margins is not None and (len(margins) != 3 or not all(0 <= margin < math.inf for margin in margins)):
            raise ValueError(f"margins must be three finite numbers, none negative, got {list(margins)}")
        check_least(1, steps=steps, save_freq=save_freq)
        check_positive(lr=lr, bound=bound)
        check_not_negative(loss_threshold=loss_threshold)
        for name, share in (("ratio", ratio), ("density", density)):
            if not 0 < share <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {share}")
        if not 0 < act_ratio < 1:  # at 1 round-off decides
            raise ValueError(f"act_ratio must be in (0, 1), got {act_ratio}")
        if merge_freq < save_freq or merge_freq % save_freq:
            raise ValueError(f"merge_freq must be a multiple of save_freq ({save_freq}), got {merge_freq}")
        check_one_of(("retrieve", "merge"), memories=memories)
        self.layer, self.margins, self.steps, self.lr = layer, margins, steps, lr
        self.loss_threshold, self.bound, self.ratio, self.act_ratio = loss_threshold, bound, ratio, act_ratio
        self.save_freq, self.merge_freq, self.density = save_freq, merge_freq, density
        self.memories, self.contexts, self.seed = memories, contexts, seed

    # ---- before the stream -------------------------------------------------------------------------------------------

    @property
    def exact_undo(self) -> bool:
        """Whether an edit that is taken out leaves what a stream without it would have made: later ones knew it."""
        return False

    def resolve_layers(self, adapter: ModelAdapter) -> tuple[int, ...]:
        """Return no layers to write; check the one behind which the side memories stand."""
        default = published_for(adapter, self.published, (at_depth(adapter, 0.85), (5.0, 20.0, 10.0)))
        self.place = default[0] if self.layer is None else self.layer
        self.alpha, self.beta, self.gamma = default[1] if self.margins is None else self.margins
        adapter.check_layer(self.place)
        return ()

    def settings(self) -> dict[str, Any]:
        """Return all settings that a result depends on."""
        return {**super().settings(), "layer": self.place}

    def set_up(self, status: Status) -> None:
        """Read the keys of text that no edit is about."""
        adapter = self.ledger.original()
        self.texts = builtin_text("true_sentences.txt").splitlines()
        rows = [encode(self.tokenizer, text) for text in self.texts]
        keys: dict[int, Tensor] = {}
        with torch.no_grad(), adapter.fast_products():
            line = TokenRows(adapter, rows, pad_token(self.tokenizer)).line()
            line.run(line.hidden, 0, self.place + 1, keys=keys)
        self.dtype = torch.promote_types(adapter.dtype, torch.float32)
        self.others = keys[self.place].to(self.dtype)
        self._sums: dict[int, tuple[tuple[Tensor, ...], Tensor]] = {}

    # ---- the memory --------------------------------------------------------------------------------------------------

    def memory_of(self, kept: Sequence[Kept]) -> SideMemories:
        """Return the side memories of some edits: merged ones, and the shards that are not merged yet."""
        adapter = self.ledger.adapter
        shards: dict[int, list[Kept]] = {}
        for edit in kept:
            shards.setdefault(self._shard(edit.entry.number), []).append(edit)
        merged = kept[-1].entry.number // self.merge_freq if kept else 0  # periods that are over
        groups: dict[tuple[int, int], list[int]] = {}
        for shard in shards:
            period = shard * self.save_freq // self.merge_freq
            over = (0, 0 if self.memories == "merge" else period)
            groups.setdefault(over if period < merged else (1, shard), []).append(shard)
        deltas, thresholds = [], []
        for members in groups.values():
            parts = [self._delta(shard, [edit.tensors["move"] for edit in shards[shard]]) for shard in members]
            deltas.append(parts[0] if len(parts) == 1 else ties_merge(parts, self.density))
            keys = torch.cat([edit.tensors["keys"] for shard in members for edit in shards[shard]])
            smallest = activations(deltas[-1], keys.to(deltas[-1])).min()
            # An edit that merging has all but wiped out must not open the memory to every token: those of other text
            # have been trained to stay below alpha.
            thresholds.append((self.act_ratio * smallest).clamp(min=self.alpha))
        if not deltas:
            return SideMemories(self.place, torch.zeros(0), torch.zeros(0))
        return SideMemories(self.place, torch.stack(deltas).to(adapter.device), torch.stack(thresholds))

    def _shard(self, number: int) -> int:
        """Return the shard of the edit of a number; being taken out moves no other."""
        return (number - 1) // self.save_freq

    def _indices(self, shard: int) -> Tensor:
        return mask_indices(math.prod(self.ledger.adapter.shape(self.place)), self.ratio, self.seed, shard)

    def _delta(self, shard: int, moves: Sequence[Tensor]) -> Tensor:
        """Return how a shard differs from the weight ``(d_out, d_in)``: the sum of what its edits have moved."""
        shape, indices = self.ledger.adapter.shape(self.place), self._indices(shard)
        known, total = self._sums.get(shard, ((), torch.zeros(len(indices), dtype=self.dtype)))
        if len(known) > len(moves) or any(a is not b for a, b in zip(known, moves, strict=False)):
            known, total = (), torch.zeros_like(total)
        for move in moves[len(known) :]:  # one by one: begun with what is known, it is the same sum bit for bit
            total = total + move
        self._sums[shard] = (tuple(moves), total)
        return torch.zeros(math.prod(shape), dtype=self.dtype).index_copy_(0, indices, total).view(shape)

    # ---- one step ----------------------------------------------------------------------------------------------------

    def learn(self, requests: Sequence[EditRequest], kept: Sequence[Kept], status: Status) -> list[Learnt]:
        """Return what each edit moves, from where the one before it has left its shard, and its keys."""
        held: dict[int, list[Mapping[str, Tensor]]] = {}
        for edit in kept:
            held.setdefault(self._shard(edit.entry.number), []).append(edit.tensors)
        learnt = []
        for number, request in enumerate(requests, self.ledger.made + 1):
            shard = self._shard(number)
            own = held.setdefault(shard, [])
            with self.ledger.adapter.fast_products():
                move, keys, facts = self._train(request, shard, own, status)
            own.append({"move": move, "keys": keys})
            learnt.append((keys, move, facts))
        most = max(len(keys) for keys, _, _ in learnt)
        return [
            # All of one shape: the last key once more changes no minimum.
            Learnt({"move": move, "keys": torch.cat([keys, keys[-1:].expand(most - len(keys), -1)])}, facts)
            for keys, move, facts in learnt
        ]

    def _train(
        self, request: EditRequest, shard: int, held: Sequence[Mapping[str, Tensor]], status: Status
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Return what an edit moves of its shard's entries, the keys of its tokens ``(n, d_in)``, and facts.

        ``held`` is what the edits that hold have left in the shard.
        """
        adapter = self.ledger.original()
        prompts = [request.text, *(f"{sentence} {request.text}" for sentence in self.texts[: self.contexts])]
        lessons = [target_lesson(*continuation(self.tokenizer, prompt, request.target_new)) for prompt in prompts]
        loss_of = LessonLoss(adapter, [lessons], self.place, pad_token(self.tokenizer))
        read: dict[int, Tensor] = {}
        with torch.no_grad():
            loss_of.line.run(loss_of.hidden, self.place, self.place + 1, keys=read)
            before = loss_of({})[0].item()
        row = read[self.place].to(self.dtype)
        taught = torch.zeros(len(row), dtype=torch.bool, device=row.device)
        taught[loss_of.where] = True
        keys, others = row[taught], torch.cat([row[~taught], self.others])
        earlier = torch.cat([keys[:0], *(one["keys"].to(keys) for one in held)])
        start, indices = self._delta(shard, [one["move"] for one in held]), self._indices(shard)
        delta, places = start.to(row.device), indices.to(row.device)
        for step in range(self.steps + 1):  # the last one only measures
            with torch.set_grad_enabled(step < self.steps):
                delta = delta.detach().requires_grad_()
                nll = loss_of({}, SoleMemory(self.place, delta, keys))[0]
                own, other = activations(delta, keys), activations(delta, others)
                loss = nll + margin_loss(own, other, self.alpha, self.beta, self.gamma)
                if len(earlier):
                    loss = loss + (self.beta - activations(delta, earlier)).relu().mean()
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the side memory of edit {described(request)} diverged at step {step}; nothing was kept. Use a "
                    f"smaller lr (now {self.lr})"
                )
            status(f"training a side memory on {request.subject!r}: step {step}/{self.steps}, loss {value:.3f}")
            known = nll.item() < self.loss_threshold and self.act_ratio * own.min() > other.max()
            if step == self.steps or known:
                break
            (gradient,) = torch.autograd.grad(loss, [delta])
            delta = masked_step(delta.detach(), gradient, places, self.lr, self.bound)
        facts = {
            **probabilities(before, nll.item()),
            "activation": own.min().item(),
            "activation_elsewhere": other.max().item(),
            "steps": float(step),
        }
        return (delta.detach().cpu() - start).flatten()[indices], keys.cpu(), facts
