"""The target optimisation: which state at the lookup token makes the model say the new object.

For each edit a vector is added to the output of one decoder layer at the subject's last token and fitted by Adam
(ROME 2202.05262 eq. 4, MEMIT 2210.07229 section 4.2; in code called ``compute_z``). Only what depends on the vector is
computed: the layers above, the tokens from the lookup token on, the head at the target's positions. Many edits are
fitted at a time; Adam is element-wise and the losses do not mix, so the results are those of separate runs up to
round-off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_edit.errors import ArgumentError
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.suffix import SuffixBatch
from lit_edit.targets.buckets import partition_by_length
from lit_edit.targets.problem import TargetProblem
from lit_edit.tokens import pad_right


class DivergedError(FloatingPointError):
    """The target optimisation of one edit left the finite numbers.

    Attributes:
        index: Which edit of the window.
        step: At which step.
    """

    def __init__(self, index: int, step: int) -> None:
        super().__init__(f"the target optimisation of edit {index} of this window diverged at step {step}")
        self.index, self.step = index, step


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
    """

    steps: int = 25
    lr: float = 0.5
    weight_decay: float = 1e-3
    clamp: float = 4.0
    kl_factor: float = 0.0625
    loss_threshold: float = 0.05
    loss_layer: int | None = None
    probability: float = 0.0

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


@dataclass
class _Bucket:
    """Rows of similar suffix length, run together."""

    suffix: SuffixBatch
    edits: Tensor  # (rows,) index of the edit of each row
    positions: Tensor  # (rows, longest target) suffix positions that predict target tokens
    targets: Tensor  # (rows, longest target) token ids
    real: Tensor  # (rows, longest target) which of them count
    essence_edits: Tensor  # (rows,) bool: a row of the KL term

    def select(self, keep: Tensor) -> _Bucket:
        rows = keep[self.edits].nonzero()[:, 0]
        fields = (self.edits, self.positions, self.targets, self.real, self.essence_edits)
        return _Bucket(self.suffix.select(rows), *(f.index_select(0, rows) for f in fields))


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
    buckets, base = _prepare(adapter, problems, layer, pad)
    count, device = len(problems), base.device
    delta = torch.zeros_like(base)
    mean, square = torch.zeros_like(delta), torch.zeros_like(delta)
    base_norm = torch.linalg.vector_norm(base, dim=1)
    contexts = torch.tensor([len(p.prompts) for p in problems], device=device, dtype=base.dtype)
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
        for bucket in buckets:
            leaf = delta.detach().requires_grad_(not final)
            with torch.set_grad_enabled(not final):
                loss = _bucket_loss(adapter, bucket, leaf, layer, stop, settings, contexts, reference, terms)
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
        if finished.any():
            buckets = [b for b in (bucket.select(active) for bucket in buckets) if len(b.edits)]

    before, after = first.tolist(), last.tolist()
    return [Target(base[i].clone(), delta[i].clone(), before[i], after[i], tuple(traces[i])) for i in range(count)]


@dataclass
class _Terms:
    """Sums over the rows of each edit, filled by the buckets."""

    nll: Tensor
    kl: Tensor
    probability: Tensor
    hits: Tensor

    @classmethod
    def zeros(cls, count: int, like: Tensor) -> _Terms:
        return cls(*(torch.zeros(count, dtype=like.dtype, device=like.device) for _ in range(4)))


def _bucket_loss(
    adapter: ModelAdapter,
    bucket: _Bucket,
    delta: Tensor,
    layer: int,
    stop: int,
    settings: TargetSettings,
    contexts: Tensor,
    reference: dict[int, Tensor],
    terms: _Terms,
) -> Tensor:
    """Sum of the bucket's parts of all edits' losses; adds the detached parts to ``terms``."""
    moved = bucket.suffix.hidden[:, :1] + delta[bucket.edits][:, None].to(bucket.suffix.hidden.dtype)
    hidden = torch.cat([moved, bucket.suffix.hidden[:, 1:]], 1)  # (rows, suffix, d)
    hidden = bucket.suffix.run(adapter, hidden, layer + 1, stop)
    picked, essence = bucket.real & ~bucket.essence_edits[:, None], bucket.essence_edits
    row = torch.arange(len(bucket.edits), device=hidden.device)[:, None].expand_as(bucket.positions)
    total = delta.new_zeros(())

    if picked.any():
        states = hidden[row[picked], bucket.positions[picked]]  # (tokens, d)
        logits = adapter.logits(adapter.finish(states))
        wanted = bucket.targets[picked]
        token_nll = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
        lengths = bucket.real.sum(1)
        row_of_token = row[picked]
        row_nll = token_nll.new_zeros(len(bucket.edits)).index_add(0, row_of_token, token_nll / lengths[row_of_token])
        total = total + (row_nll / contexts[bucket.edits]).sum()
        with torch.no_grad():
            rows = ~essence
            owner = bucket.edits[rows]
            terms.nll.index_add_(0, owner, row_nll[rows].to(terms.nll))
            terms.probability.index_add_(0, owner, torch.exp(-row_nll[rows]).to(terms.nll))
            if settings.probability > 0:
                wrong = (logits.argmax(1) != wanted).to(row_nll)
                miss = torch.zeros_like(row_nll).index_add(0, row_of_token, wrong)
                terms.hits.index_add_(0, owner, (miss[rows] == 0).to(terms.nll))

    if essence.any():
        owner = bucket.edits[essence]
        logp = torch.log_softmax(adapter.logits(adapter.finish(hidden[essence, 0])), -1)
        for index, edit in enumerate(owner.tolist()):
            reference.setdefault(edit, logp[index].detach())
        base = torch.stack([reference[edit] for edit in owner.tolist()])
        # KL(p_now || p_unchanged), the direction of the reference implementations.
        divergence = (logp.exp() * (logp - base)).sum(1)
        total = total + settings.kl_factor * divergence.sum()
        terms.kl.index_add_(0, owner, (settings.kl_factor * divergence).detach().to(terms.kl))
    return total


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


@torch.no_grad()
def _prepare(
    adapter: ModelAdapter, problems: Sequence[TargetProblem], layer: int, pad: int
) -> tuple[list[_Bucket], Tensor]:
    """Run the unchanged model once over all rows; return the buckets and ``h0`` ``(edits, d_model)``."""
    rows: list[tuple[int, tuple[int, ...], int, tuple[int, ...]]] = []  # edit, ids, lookup, target (empty: KL row)
    plain: dict[int, int] = {}
    for edit, problem in enumerate(problems):
        plain[len(rows)] = edit
        rows += [(edit, p.ids + problem.target[:-1], p.lookup, problem.target) for p in problem.prompts]
        rows.append((edit, problem.essence.ids, problem.essence.lookup, ()))
    buckets: list[_Bucket] = []
    base: dict[int, Tensor] = {}
    device = adapter.device
    for members in partition_by_length([len(ids) - lookup for _, ids, lookup, _ in rows]):
        chosen = [rows[m] for m in members]
        ids, mask = pad_right([r[1] for r in chosen], pad, device)
        trace = adapter.trace(ids, mask, at=layer + 1, keep_cache=True)
        lookups, lengths = [r[2] for r in chosen], [len(r[1]) for r in chosen]
        for index, member in enumerate(members):
            if member in plain:
                base[plain[member]] = trace.hidden[index, lookups[index]]
        longest = max(1, *(len(r[3]) for r in chosen)) if chosen else 1
        positions = torch.zeros(len(chosen), longest, dtype=torch.long)
        targets, real = torch.zeros_like(positions), torch.zeros(len(chosen), longest, dtype=torch.bool)
        for index, (_, row_ids, lookup, target) in enumerate(chosen):
            size = len(target)
            positions[index, :size] = torch.arange(len(row_ids) - size, len(row_ids)) - lookup
            targets[index, :size] = torch.tensor(target, dtype=torch.long)
            real[index, :size] = True
        buckets.append(
            _Bucket(
                suffix=SuffixBatch.from_trace(adapter, trace, lookups, lengths),
                edits=torch.tensor([r[0] for r in chosen], device=device),
                positions=positions.to(device),
                targets=targets.to(device),
                real=real.to(device),
                essence_edits=torch.tensor([not r[3] for r in chosen], device=device),
            )
        )
    states = torch.stack([base[i] for i in range(len(problems))])
    return buckets, states if states.dtype == torch.float64 else states.float()
