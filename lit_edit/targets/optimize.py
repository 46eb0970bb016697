"""The target optimisation: which state at the lookup token makes the model say the new object.

For each edit a vector is added to the output of one decoder layer at the subject's last token and fitted by Adam
(ROME 2202.05262 eq. 4, MEMIT 2210.07229 section 4.2; in code called ``compute_z``). Only what depends on the vector is
computed: the layers above, the tokens from the lookup token on, the head at the target's positions. Many edits are
fitted at a time; Adam is element-wise and the losses do not mix, so the results are those of separate runs up to
round-off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lit_edit.errors import ArgumentError
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.packed import Line, TokenRows
from lit_edit.targets.problem import TargetProblem


class DivergedError(FloatingPointError):
    """The target optimisation of one edit left the finite numbers.

    Attributes:
        index: Which edit of the window.
        step: At which step.
    """

    def __init__(self, index: int, step: int) -> None:
        super().__init__(f"the target optimisation of edit {index} of this window diverged at step {step}")
        self.index, self.step = index, step


_CHUNK_TOKENS = 768
"""Tokens run forward and backward at a time: enough to keep matrix products busy, few enough to bound memory."""


@dataclass(frozen=True)
class TargetSettings:
    """Settings of the target optimisation; the defaults are MEMIT's for models of the Llama family.

    Args:
        steps: Forward passes at most; there is one Adam step less.
        lr: Learning rate of Adam.
        weight_decay: Factor of ``|delta| / |h0|^2`` in the loss.
        clamp: After each step ``|delta|`` is cut to this multiple of ``|h0|``.
        kl_factor: Factor of the KL divergence on "<subject> is a".
        loss_threshold: Stop an edit whose loss falls below this.
        loss_layer: Read the loss after this layer; by default the last.
        probability: Stop an edit as soon as its target is the most probable continuation in every context and its mean
            probability reaches this; 0 stops by the loss alone.
        plain_first: Fit on the plain prompt alone until that would stop, and only then in all contexts. Most steps then
            cost a fraction, and the result is another one: not for comparison with published numbers.
    """

    steps: int = 25
    lr: float = 0.5
    weight_decay: float = 1e-3
    clamp: float = 4.0
    kl_factor: float = 0.0625
    loss_threshold: float = 0.05
    loss_layer: int | None = None
    probability: float = 0.0
    plain_first: bool = False

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("lr", 0), ("weight_decay", 0), ("clamp", 0), ("kl_factor", 0)):
            value = getattr(self, name)
            if not value >= low or (name in ("lr", "clamp") and value <= 0):
                raise ValueError(
                    f"{name} must be {'positive' if name in ('lr', 'clamp') else f'at least {low}'}, got {value}"
                )
        if not math.isfinite(self.loss_threshold):
            raise ValueError(f"loss_threshold must be finite, got {self.loss_threshold}")
        if not 0.0 <= self.probability < 1.0:
            raise ValueError(f"probability must be in [0, 1), got {self.probability}")


@dataclass(frozen=True)
class Target:
    """The fitted state of one edit.

    Attributes:
        base: ``(d_model,)``, the unchanged state ``h0`` at the lookup token of the plain prompt.
        delta: ``(d_model,)``, what is to be added; the target state is :attr:`value`.
        probability_before: Mean over contexts of the target's (length-normalised) probability, unchanged model.
        probability: The same with the fitted delta.
        trace: Per forward pass ``(loss, nll, kl, weight_decay)``.
    """

    base: Tensor
    delta: Tensor
    probability_before: float
    probability: float
    trace: tuple[tuple[float, float, float, float], ...] = field(repr=False)

    @property
    def value(self) -> Tensor:
        """The target state ``z = h0 + delta``."""
        return self.base + self.delta

    def as_state(self) -> dict[str, Any]:
        """Return the target as tensors and primitives, for checkpoints."""
        return {
            "base": self.base,
            "delta": self.delta,
            "probability": [self.probability_before, self.probability],
            "trace": [list(row) for row in self.trace],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Target:
        """Restore :meth:`as_state`, bit for bit."""
        trace = tuple((row[0], row[1], row[2], row[3]) for row in state["trace"])
        before, after = state["probability"]
        return cls(state["base"].clone(), state["delta"].clone(), before, after, trace)


@dataclass
class _Chunk:
    """Rows of some edits, run together from their lookup tokens on.

    Attributes:
        line: The tokens.
        hidden: ``(tokens, d_model)``, the unchanged states entering the first layer to run.
        edits: Which edits.
        moved: ``(rows,)``, where in the line the lookup tokens are.
        owner: ``(rows,)``, the edit of each of those.
        read: ``(target tokens,)``, where the states that predict target tokens are.
        wanted: ``(target tokens,)``, the target tokens themselves.
        row: ``(target tokens,)``, the prompt (counted within the chunk) that each of those belongs to.
        row_owner: ``(prompts,)``, the edit of each prompt.
        lengths: ``(prompts,)``, target tokens of each.
        essence: ``(edits,)``, where the KL terms' states are.
    """

    line: Line
    hidden: Tensor
    edits: Tensor
    moved: Tensor
    owner: Tensor
    read: Tensor
    wanted: Tensor
    row: Tensor
    row_owner: Tensor
    lengths: Tensor
    essence: Tensor


class _Window:
    """The rows of all edits of a window: the unchanged model's states, and chunks of what is to be run again."""

    @torch.no_grad()
    def __init__(
        self, adapter: ModelAdapter, problems: Sequence[TargetProblem], layer: int, stop: int, pad: int
    ) -> None:
        self.adapter, self.problems, self.layer, self.stop = adapter, problems, layer, stop
        rows: list[tuple[int, ...]] = []
        lookups: list[int] = []
        self.rows_of: list[range] = []  # per edit: its prompts and, last, the row of the KL term
        for problem in problems:
            self.rows_of.append(range(len(rows), len(rows) + len(problem.prompts) + 1))
            rows += [prompt.ids + problem.target[:-1] for prompt in problem.prompts] + [problem.essence.ids]
            lookups += [prompt.lookup for prompt in problem.prompts] + [problem.essence.lookup]
        # From the lookup token on each row is its own: its edit moves it.
        self.rows, self.lookups = TokenRows(adapter, rows, pad, share=lookups), lookups
        self.lengths = [len(row) for row in rows]
        everything = self.rows.line()
        states = everything.run(everything.hidden, 0, layer + 1)
        self.hidden = torch.empty_like(states)
        self.hidden[everything.nodes] = states  # by node
        # What comes before the lookup tokens never changes: its attention keys and values are computed once.
        self.before = self.rows.line(stops=lookups) if any(lookups) else None
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        if self.before is not None:
            self.before.run(self.hidden[self.before.nodes], layer + 1, stop, keep=self.kept)

    def base(self) -> Tensor:
        """Return ``h0`` ``(edits, d_model)``: the states at the lookup tokens of the plain prompts."""
        nodes = [self.rows.paths[rows[0]][self.lookups[rows[0]]] for rows in self.rows_of]
        states = self.hidden[torch.tensor(nodes, device=self.hidden.device)]
        return states if states.dtype == torch.float64 else states.float()

    def chunks(self, edits: Sequence[int], plain: Collection[int] = ()) -> list[_Chunk]:
        """Cut the rows of some edits into chunks of about ``_CHUNK_TOKENS`` tokens.

        Args:
            edits: Which edits.
            plain: Those of them that are to be seen at their plain prompts only.
        """
        rows_of = {edit: self._rows(edit, edit in plain) for edit in edits}
        sizes = {edit: sum(self.lengths[r] - self.lookups[r] for r in rows) for edit, rows in rows_of.items()}
        total = sum(sizes.values())
        limit = total / max(1, math.ceil(total / _CHUNK_TOKENS))  # chunks of about equal size
        groups: list[list[int]] = []
        size = limit
        for edit in edits:
            if size >= limit:
                groups.append([])
                size = 0.0
            groups[-1].append(edit)
            size += sizes[edit]
        return [self._chunk({edit: rows_of[edit] for edit in group}) for group in groups]

    def _rows(self, edit: int, plain: bool) -> list[int]:
        """Return the rows of an edit; the last one is that of the KL term."""
        rows = self.rows_of[edit]
        return [rows[0], rows[-1]] if plain else list(rows)

    def _chunk(self, rows_of: Mapping[int, Sequence[int]]) -> _Chunk:
        rows = [row for group in rows_of.values() for row in group]
        line = self.rows.line(rows, [self.lookups[r] for r in rows], [self.lengths[r] for r in rows], self.before)
        found: dict[str, list[int]] = {name: [] for name in
            ("moved", "owner", "read", "wanted", "row", "row_owner", "lengths", "essence")}  # fmt: skip
        for edit, (*prompts, essence) in rows_of.items():
            target = self.problems[edit].target
            found["moved"] += [line.index(row, self.lookups[row]) for row in (*prompts, essence)]
            found["owner"] += [edit] * (len(prompts) + 1)
            found["essence"].append(line.index(essence, self.lookups[essence]))
            for row in prompts:
                last = self.lengths[row]
                found["read"] += [line.index(row, position) for position in range(last - len(target), last)]
                found["wanted"] += target
                found["row"] += [len(found["row_owner"])] * len(target)
                found["row_owner"].append(edit)
                found["lengths"].append(len(target))
        device = self.hidden.device
        tensors = {name: torch.tensor(values, device=device) for name, values in found.items()}
        return _Chunk(line, self.hidden[line.nodes], torch.tensor(list(rows_of), device=device), **tensors)


def optimise_targets(
    adapter: ModelAdapter,
    problems: Sequence[TargetProblem],
    layer: int,
    settings: TargetSettings,
    pad: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Target]:
    """Fit the targets of some edits together.

    Args:
        adapter: The model to fit on (a view with the original weights, for D4S).
        problems: One per edit.
        layer: The highest edited layer; its output is moved.
        settings: Steps, rates and bounds.
        pad: Token id for padding.
        progress: Called with ``(step, steps)`` before each forward pass.

    Returns:
        The targets, in order.

    Raises:
        ArgumentError: If ``layer`` or ``settings.loss_layer`` does not exist.
        FloatingPointError: If a loss or a step is not finite; nothing is written then.
    """
    if not problems:
        return []
    adapter.check_layer(layer)
    loss_layer = adapter.n_layers - 1 if settings.loss_layer is None else settings.loss_layer
    if not 0 <= loss_layer < adapter.n_layers:
        raise ArgumentError(
            f"loss_layer {loss_layer} does not exist: this model has layers 0 to {adapter.n_layers - 1}"
        )
    stop = max(loss_layer, layer) + 1
    window = _Window(adapter, problems, layer, stop, pad)
    base = window.base()
    count, device = len(problems), base.device
    delta = torch.zeros_like(base)
    mean, square = torch.zeros_like(delta), torch.zeros_like(delta)
    base_norm = torch.linalg.vector_norm(base, dim=1)
    every = torch.tensor([len(p.prompts) for p in problems], device=device, dtype=base.dtype)
    plain = {edit for edit, problem in enumerate(problems) if settings.plain_first and len(problem.prompts) > 1}
    contexts = every.clone()
    contexts[list(plain)] = 1
    chunks = window.chunks(range(count), plain)
    reference: dict[int, Tensor] = {}  # the KL term's distributions of the unchanged model, by edit
    traces: list[list[tuple[float, float, float, float]]] = [[] for _ in problems]
    first = torch.zeros(count, dtype=base.dtype, device=device)
    last = torch.zeros_like(first)
    active = torch.ones(count, dtype=torch.bool, device=device)

    for step in range(settings.steps):
        if progress is not None:
            progress(step, settings.steps)
        final = step == settings.steps - 1
        terms = _Terms.zeros(count, base)
        gradient = torch.zeros_like(delta)
        for chunk in chunks:
            leaf = delta.detach().requires_grad_(not final)
            with torch.set_grad_enabled(not final):
                loss = _chunk_loss(window, chunk, leaf, settings, contexts, reference, terms)
            if not final:
                gradient += torch.autograd.grad(loss, leaf)[0]
        norm = torch.linalg.vector_norm(delta, dim=1)
        decay = settings.weight_decay * norm / base_norm**2
        nll = terms.nll / contexts
        loss_value = nll + terms.kl + decay
        probability = terms.probability / contexts
        _refuse_divergence(loss_value, active, step)
        for index, row in enumerate(torch.stack([loss_value, nll, terms.kl, decay], 1).tolist()):
            if active[index]:
                traces[index].append((row[0], row[1], row[2], row[3]))
        first = probability if step == 0 else first
        last = torch.where(active, probability, last)
        done = loss_value < settings.loss_threshold
        if settings.probability > 0:
            done |= (terms.hits == contexts) & (probability >= settings.probability)
        widened = [edit for edit in sorted(plain) if done[edit]]  # said at the plain prompt: on to all contexts
        plain.difference_update(widened)
        done[widened] = False
        contexts[widened] = every[widened]
        finished = active & done
        active = active & ~done
        if final or not active.any():
            break
        # Gradient of the weight decay, zero at delta = 0 as autograd has it.
        safe = torch.where(norm > 0, norm, torch.ones_like(norm))
        gradient += (settings.weight_decay / base_norm**2 / safe)[:, None] * delta
        moved = _adam_step(delta, gradient, mean, square, step + 1, settings.lr)
        radius = settings.clamp * base_norm
        length = torch.linalg.vector_norm(moved, dim=1)
        _refuse_divergence(length, active, step)  # clamping an infinite step would make it zero
        scale = torch.where(length > radius, radius / length, torch.ones_like(length))
        delta = torch.where(active[:, None], moved * scale[:, None], delta)
        if finished.any() or widened:
            chunks = window.chunks(active.nonzero()[:, 0].tolist(), plain)

    before, after = first.tolist(), last.tolist()
    return [Target(base[i].clone(), delta[i].clone(), before[i], after[i], tuple(traces[i])) for i in range(count)]


@dataclass
class _Terms:
    """Sums over the rows of each edit, filled by the chunks."""

    nll: Tensor
    kl: Tensor
    probability: Tensor
    hits: Tensor

    @classmethod
    def zeros(cls, count: int, like: Tensor) -> _Terms:
        return cls(*(torch.zeros(count, dtype=like.dtype, device=like.device) for _ in range(4)))


def _chunk_loss(
    window: _Window,
    chunk: _Chunk,
    delta: Tensor,
    settings: TargetSettings,
    contexts: Tensor,
    reference: dict[int, Tensor],
    terms: _Terms,
) -> Tensor:
    """Sum of the losses of the chunk's edits; adds the detached parts to ``terms``."""
    adapter = window.adapter
    hidden = chunk.hidden.index_add(0, chunk.moved, delta[chunk.owner].to(chunk.hidden.dtype))
    hidden = chunk.line.run(hidden, window.layer + 1, window.stop, window.kept)
    logits = adapter.logits(adapter.finish(hidden[torch.cat([chunk.read, chunk.essence])]))
    logp = torch.log_softmax(logits, -1)
    said, essence = logp[: len(chunk.read)], logp[len(chunk.read) :]

    token_nll = -said.gather(1, chunk.wanted[:, None])[:, 0]
    row_nll = token_nll.new_zeros(len(chunk.lengths)).index_add(0, chunk.row, token_nll / chunk.lengths[chunk.row])
    total = (row_nll / contexts[chunk.row_owner]).sum()
    terms.nll.index_add_(0, chunk.row_owner, row_nll.detach().to(terms.nll))
    terms.probability.index_add_(0, chunk.row_owner, torch.exp(-row_nll.detach()).to(terms.nll))
    if settings.probability > 0:
        wrong = (said.detach().argmax(1) != chunk.wanted).to(row_nll.dtype)
        miss = torch.zeros_like(row_nll).index_add(0, chunk.row, wrong)
        terms.hits.index_add_(0, chunk.row_owner, (miss == 0).to(terms.nll))

    edits = chunk.edits.tolist()
    for index, edit in enumerate(edits):
        if edit not in reference:
            reference[edit] = essence[index].detach().clone()
    base = torch.stack([reference[edit] for edit in edits])
    # KL(p_now || p_unchanged), the direction of the reference implementations.
    divergence = (essence.exp() * (essence - base)).sum(1)
    terms.kl.index_add_(0, chunk.edits, (settings.kl_factor * divergence).detach().to(terms.kl))
    return total + settings.kl_factor * divergence.sum()


def _refuse_divergence(values: Tensor, active: Tensor, step: int) -> None:
    """Raise ``FloatingPointError`` if the value of an active edit is not finite."""
    bad = (~torch.isfinite(values) & active).nonzero()
    if len(bad):
        raise DivergedError(int(bad[0]), step)


def _adam_step(delta: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, step: int, lr: float) -> Tensor:
    """One step of Adam (betas 0.9 and 0.999, eps 1e-8); updates the moments, returns the new delta."""
    mean.lerp_(gradient, 0.1)
    square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
    denominator = (square.sqrt() / (1 - 0.999**step) ** 0.5).add_(1e-8)
    return delta.addcdiv(mean, denominator, value=-lr / (1 - 0.9**step))
