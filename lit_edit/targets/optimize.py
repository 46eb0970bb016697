"""The target optimisation: which state at the lookup token makes the model say the new object.

For each edit a vector is added to the output of one decoder layer at the subject's last token and fitted by Adam
(ROME 2202.05262 eq. 4, MEMIT 2210.07229 section 4.2; in code called ``compute_z``). Only what depends on the vector is
computed: the layers above, the tokens from the lookup token on, the head at the target's positions. Many edits are
fitted at a time; Adam is element-wise and the losses do not mix, so the results are those of separate runs up to
round-off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lit_edit.devices.host_memory import kept_memory
from lit_edit.errors import ArgumentError, check_least, check_one_of, check_within
from lit_edit.models.adapter import ModelAdapter
from lit_edit.targets.losses import TargetLoss
from lit_edit.targets.problem import TargetProblem
from lit_edit.targets.steps import Adam, Polyak, StepRule
from lit_edit.targets.window import Window


class DivergedError(FloatingPointError):
    """The target optimisation of one edit, ``index`` of the window, left the finite numbers at a step."""

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
        plain_first: Fit on the plain prompt alone until that would stop, and only then in all contexts. Most steps then
            cost a fraction, and the result is another one: not for comparison with published numbers.
        rule: ``adam``, as published, or ``polyak`` (:class:`lit_edit.targets.steps.Polyak`): half the steps, a shorter
            vector, another result.
        trust: With ``polyak``, no step is longer than this share of ``|h0|``.
        margin: By how many nats each target token must lead all others before an edit stops; with ``probability`` 0 it
            stops then.
        first_choice: Stop an edit at so many steps at which every target token was the first choice in every context
            (ENCORE's most-probable stop, 2 there); 0 does not count them.
        anchor: What ``clamp`` and ``weight_decay`` measure ``|delta|`` against, in place of ``h0``: the ``state``
            behind the layer (MEMIT), or the output of its ``mlp`` (ROME).
        moved: What the vector is added to: the ``state`` behind the layer, or the outputs of its two ``modules``,
            attention and MLP, which get a vector each (PMET); the target is then the MLP's output.
        precision: Type of the matrix products in the layers above. ``bfloat16`` is faster on processors that have it;
            states, norms, sums and losses stay as they are, and so do statistics, keys and the solve. ``fastest`` takes
            it where a short measurement says that it pays.
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
    rule: Literal["adam", "polyak"] = "adam"
    trust: float = 0.3
    margin: float = 0.0
    first_choice: int = 0
    anchor: Literal["state", "mlp"] = "state"
    moved: Literal["state", "modules"] = "state"
    precision: Literal["float32", "bfloat16", "fastest"] = "float32"

    def __post_init__(self) -> None:
        for name in ("steps", "lr", "weight_decay", "clamp", "kl_factor", "loss_threshold", "probability", "trust",
                     "margin", "first_choice"):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{name} must be a number, got {value!r}")
            if not math.isfinite(value) and name not in ("clamp", "trust"):  # without these two no step is cut
                raise ValueError(f"{name} must be finite, got {value}")
        check_least(1, steps=self.steps)
        check_least(0, weight_decay=self.weight_decay, kl_factor=self.kl_factor)
        check_least(0, margin=self.margin, first_choice=self.first_choice)
        for name in ("lr", "clamp", "trust"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        check_one_of(("adam", "polyak"), rule=self.rule)
        check_one_of(("state", "mlp"), anchor=self.anchor)
        check_one_of(("state", "modules"), moved=self.moved)
        check_one_of(("float32", "bfloat16", "fastest"), precision=self.precision)
        check_within("[0, 1)", probability=self.probability)


@dataclass(frozen=True)
class Target:
    """The fitted state of one edit.

    Attributes:
        base: ``(d_model,)``, the unchanged state ``h0`` at the lookup token of the plain prompt; the MLP's output there
            with ``moved: modules``.
        delta: ``(d_model,)``, what is to be added; the target state is :attr:`value`.
        probability_before: Mean over contexts of the target's (length-normalised) probability, unchanged model.
        probability: The same with the fitted delta.
        trace: Per forward pass ``(loss, nll, kl, weight_decay)``.
        output: ``(d_model,)``, what the layer's MLP has added to :attr:`base`, where it was asked for.
    """

    base: Tensor
    delta: Tensor
    probability_before: float
    probability: float
    trace: tuple[tuple[float, float, float, float], ...] = field(repr=False)
    output: Tensor | None = None

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


def optimise_targets(
    adapter: ModelAdapter,
    problems: Sequence[TargetProblem],
    layer: int,
    settings: TargetSettings,
    pad: int = 0,
    progress: Callable[[int, int], None] | None = None,
    outputs: bool = False,
) -> list[Target]:
    """Fit the targets of some edits together; what is moved is the output of ``layer``, the highest edited one.

    ``progress`` is called with ``(step, steps)`` before each forward pass; ``outputs`` asks for :attr:`Target.output`.

    Raises:
        ArgumentError: If ``layer`` or ``settings.loss_layer`` does not exist.
        FloatingPointError: If a loss or a step is not finite; nothing is written then.
    """
    if not problems:
        return []
    with adapter.fast_products(), kept_memory():
        return _optimise(adapter, problems, layer, settings, pad, progress, outputs)


def _optimise(
    adapter: ModelAdapter,
    problems: Sequence[TargetProblem],
    layer: int,
    settings: TargetSettings,
    pad: int,
    progress: Callable[[int, int], None] | None,
    outputs: bool,
) -> list[Target]:
    adapter.check_layer(layer)
    loss_layer = adapter.n_layers - 1 if settings.loss_layer is None else settings.loss_layer
    if not 0 <= loss_layer < adapter.n_layers:
        raise ArgumentError(
            f"loss_layer {loss_layer} does not exist: this model has layers 0 to {adapter.n_layers - 1}"
        )
    stop = max(loss_layer, layer) + 1
    both = settings.moved == "modules"
    window = Window(adapter, problems, layer, stop, pad, modules=both)
    if settings.precision == "bfloat16" or (settings.precision == "fastest" and adapter.bfloat16_pays()):
        window.adapter = adapter.rounded(torch.bfloat16, layer + 1)
    evaluate = TargetLoss(window, settings.kl_factor)
    # All ranks are to take the same steps.
    base = adapter.ranks.same(window.module_bases() if both else window.base())
    count, device = len(problems), base.device
    delta = torch.zeros_like(base)
    output = adapter.ranks.same(window.mlp_base()) if outputs or settings.anchor == "mlp" else None
    anchor = base if both or settings.anchor == "state" or output is None else output
    parts = _Parts.of(anchor, 2 if both else 1)
    leading = torch.zeros(count, dtype=torch.int64, device=device)  # steps at which the target was the first choice
    length = torch.linalg.vector_norm(anchor, dim=1)
    rule: StepRule = Polyak(settings.trust, length, delta) if settings.rule == "polyak" else Adam(settings.lr, delta)
    every = torch.tensor([len(p.prompts) for p in problems], device=device, dtype=base.dtype)
    plain = {edit for edit, problem in enumerate(problems) if settings.plain_first and len(problem.prompts) > 1}
    contexts = every.clone()
    contexts[list(plain)] = 1
    chunks = window.chunks(range(count), plain)
    traces: list[list[tuple[float, float, float, float]]] = [[] for _ in problems]
    first = torch.zeros(count, dtype=base.dtype, device=device)
    last = torch.zeros_like(first)
    active = torch.ones(count, dtype=torch.bool, device=device)

    for step in range(settings.steps):
        if progress is not None:
            progress(step, settings.steps)
        final = step == settings.steps - 1
        losses = evaluate(chunks, delta, contexts, with_gradient=not final)
        decay = settings.weight_decay * parts.decay(delta)
        loss = losses.nll + losses.kl + decay
        _refuse_divergence(loss, active, step)
        for index, row in enumerate(torch.stack([loss, losses.nll, losses.kl, decay], 1).tolist()):
            if active[index]:
                traces[index].append((row[0], row[1], row[2], row[3]))
        first = losses.probability if step == 0 else first
        last = torch.where(active, losses.probability, last)
        done = loss < settings.loss_threshold
        leading += losses.margin > 0
        if settings.first_choice > 0:
            done |= leading >= settings.first_choice
        if settings.probability > 0 or settings.margin > 0:
            done |= (losses.margin > settings.margin) & (losses.probability >= settings.probability)
        widened = [edit for edit in sorted(plain) if done[edit]]  # said at the plain prompt: on to all contexts
        plain.difference_update(widened)
        done[widened] = False
        contexts[widened] = every[widened]
        leading[widened] = 0
        finished = active & done
        active = active & ~done
        if final or not active.any():
            break
        gradient = losses.gradient + settings.weight_decay * parts.decay_gradient(delta)
        moved = rule.step(delta, gradient, loss)
        _refuse_divergence(torch.linalg.vector_norm(moved, dim=1), active, step)  # clamping infinity would make it zero
        delta = torch.where(active[:, None], parts.clamped(moved, settings.clamp), delta)
        if finished.any() or widened:
            chunks = window.chunks(active.nonzero()[:, 0].tolist(), plain)

    before, after = first.tolist(), last.tolist()
    added = [None if output is None or not outputs else output[i].clone() for i in range(count)]
    base, delta = (value[:, : parts.width] for value in (base, delta))  # of two modules the MLP comes first
    return [
        Target(base[i].clone(), delta[i].clone(), before[i], after[i], tuple(traces[i]), added[i]) for i in range(count)
    ]


@dataclass(frozen=True)
class _Parts:
    """Vectors of one or several parts of a width, each measured against a length of its own, ``(edits, parts)``."""

    lengths: Tensor
    width: int

    @classmethod
    def of(cls, anchor: Tensor, count: int) -> _Parts:
        width = anchor.shape[1] // count
        return cls(torch.linalg.vector_norm(anchor.view(len(anchor), count, width), dim=2), width)

    def norms(self, delta: Tensor) -> Tensor:
        return torch.linalg.vector_norm(delta.view(*self.lengths.shape, self.width), dim=2)

    def decay(self, delta: Tensor) -> Tensor:
        """Return ``(edits,)``, the sum over parts of ``|delta| / length^2``."""
        return (self.norms(delta) / self.lengths**2).sum(1)

    def decay_gradient(self, delta: Tensor) -> Tensor:
        """Return its gradient, zero at zero as autograd has it."""
        norms = self.norms(delta)
        safe = torch.where(norms > 0, norms, torch.ones_like(norms))
        return (delta.view(*self.lengths.shape, self.width) / (self.lengths**2 * safe)[..., None]).flatten(1)

    def clamped(self, delta: Tensor, factor: float) -> Tensor:
        """Return vectors none of whose parts is longer than ``factor`` times its length."""
        norms, radius = self.norms(delta), factor * self.lengths
        scale = torch.where(norms > radius, radius / norms, torch.ones_like(norms))
        return (delta.view(*self.lengths.shape, self.width) * scale[..., None]).flatten(1)


def _refuse_divergence(values: Tensor, active: Tensor, step: int) -> None:
    bad = (~torch.isfinite(values) & active).nonzero()
    if len(bad):
        raise DivergedError(int(bad[0]), step)
