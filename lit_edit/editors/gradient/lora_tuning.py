r"""LoRA (2106.09685) and AdaLoRA (2303.10512) as editors: fine-tuning of a narrow product beside the weight.

.. math:: W = W_0 + \frac{\alpha}{r} B A, \qquad
          W = W_0 + \frac{\alpha}{r} B\, \mathrm{diag}(E)\, A,

with the loss of FT-M (the target's tokens after the prompt). One adapter learns the whole stream: an edit goes on with
the factors that the one before left. AdaLoRA begins each edit with ``init_rank`` directions and lets go of the least
important ones, by a schedule within the edit, until ``rank`` are left on average;
:math:`\lVert A A^\top - I \rVert` and :math:`\lVert B^\top B - I \rVert` are part of its loss.

The factors, their first values, the product and AdaLoRA's rank allocator are ``peft``'s, on stand-ins for the edited
layers: nothing is put into the model, and its settings (cache, checkpointing, what has a gradient) stay as they are.
Published code for editing changes those for good, and never calls the allocator, so that its AdaLoRA has one fixed
rank. There is no dropout here: edits are to be the same each time.

By nature the rank bounds what can be told apart: later edits overwrite earlier ones, and nothing protects other facts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_edit.data.request import EditRequest
from lit_edit.devices.algebra import for_algebra
from lit_edit.editors.base import Deltas, EditorInfo
from lit_edit.editors.gradient.engine import GradientEditor, Learner
from lit_edit.editors.lessons import Lesson, target_lesson
from lit_edit.errors import check_least, check_not_negative, check_positive
from lit_edit.files.extras import import_extra
from lit_edit.text.tokens import continuation

_ADAPTER = "default"


def low_rank_update(held: Mapping[str, Tensor], layer: int, scale: float, when: str = "") -> Tensor:
    r"""Return :math:`s\,B\,\mathrm{diag}(E)\,A`, ``(d_out, d_in)`` in float64, of a layer's factors.

    They are held as ``B.<layer>`` ``(d_out, r)``, ``A.<layer>`` ``(r, d_in)`` and, of AdaLoRA, ``E.<layer>``
    ``(r, 1)``; on record behind ``when``.

    Example:
        >>> low_rank_update({"B.3": torch.ones(1, 2), "A.3": torch.eye(2)}, 3, 0.5)
        tensor([[0.5000, 0.5000]], dtype=torch.float64)
    """
    up, down = (for_algebra(held[f"{when}{kind}.{layer}"]) for kind in "BA")
    values = held.get(f"{when}E.{layer}")
    return scale * up @ (down if values is None else for_algebra(values) * down)


def orthogonality(up: Tensor, down: Tensor) -> Tensor:
    r"""Return the mean of :math:`\lVert B^\top B - I \rVert` and :math:`\lVert A A^\top - I \rVert` (AdaLoRA, eq. 4).

    Both are Frobenius norms, of :math:`B` ``(d_out, r)`` and :math:`A` ``(r, d_in)``.

    Example:
        >>> orthogonality(torch.eye(3, 2), torch.eye(2, 3))
        tensor(0.)
    """
    eye = torch.eye(down.shape[0], dtype=down.dtype, device=down.device)
    return ((up.T @ up - eye).norm() + (down @ down.T - eye).norm()) / 2


class _Factors(Learner):
    """Factors in peft's ``layers`` of ``tuner``, around the stand-ins, beside what the updates are without them."""

    def __init__(self, tuner: Any, layers: Mapping[int, Any], start: Deltas, scale: float) -> None:
        self.tuner, self.layers, self.scale, self.start = tuner, layers, scale, start
        self.parameters = [p for layer in layers.values() for p in factors(layer).values()]
        for parameter in self.parameters:
            parameter.requires_grad_()
        self.before = self._now()
        like = self.parameters[0]
        # Zero but for round-off, unless edits were taken out or the updates are transformed.
        self.rest = {n: (start[n] - low_rank_update(self.before, n, scale)).to(like) for n in layers}

    def updates(self) -> Deltas:
        return {n: self.rest[n] + layer.get_delta_weight(_ADAPTER) for n, layer in self.layers.items()}

    def stepped(self, step: int) -> None:
        """Leave the factors where Adam has put them."""

    def record(self, dtype: torch.dtype) -> dict[str, Tensor]:
        when = {"before": self.before, "after": self._now()}
        return {f"{name}.{kind}": factor for name, held in when.items() for kind, factor in held.items()}

    def _now(self) -> dict[str, Tensor]:
        return {
            f"{name}.{n}": p.detach().clone() for n, layer in self.layers.items() for name, p in factors(layer).items()
        }


class _Allocated(_Factors):
    """Factors of AdaLoRA, whose ranks are allocated anew in each edit."""

    def penalty(self) -> Tensor | float:
        weight = self.tuner.peft_config[_ADAPTER].orth_reg_weight
        own = [factors(layer) for layer in self.layers.values()]
        return weight * torch.stack([orthogonality(parts["B"], parts["A"]) for parts in own]).mean()

    def stepped(self, step: int) -> None:
        self.tuner.update_and_allocate(step)


def factors(layer: Any) -> dict[str, nn.Parameter]:
    """Return a peft layer's factors: ``B`` ``(d_out, r)``, ``A`` ``(r, d_in)``, of AdaLoRA also ``E`` ``(r, 1)``."""
    found = {"A": layer.lora_A[_ADAPTER], "B": layer.lora_B[_ADAPTER]}
    if hasattr(layer, "lora_E"):
        found["E"] = layer.lora_E[_ADAPTER]
    return {name: factor if isinstance(factor, nn.Parameter) else factor.weight for name, factor in found.items()}


class LoRA(GradientEditor):
    """Fine-tune a LoRA adapter through the stream; see :mod:`lit_edit.editors.gradient.lora_tuning`.

    Args:
        rank: Of the product.
        alpha: The product is multiplied by ``alpha / rank``.
        seed: Seeds the adapter's first values.
        steps: Steps of Adam at most.
        lr: Its learning rate.
        kwargs: As for :class:`GradientEditor`; of the increments the factors are on record.

    Raises:
        NotHereError: If ``peft`` is not installed.
    """

    about: ClassVar[EditorInfo] = EditorInfo(
        title="LoRA",
        paper="LoRA, 2106.09685",
        kind="fine-tuning",
        cost="steps x passes of the layers above the lowest edited one",
        state="one adapter, which does not grow; on record its factors per step",
        undo="approximate",
        lora=True,
        lacks="room for more edits than its rank holds; regard for anything but the edit",
    )
    depends_on = "rank alpha seed"

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 32.0,
        seed: int = 0,
        steps: int = 50,
        lr: float = 5e-3,
        **kwargs: Any,
    ) -> None:
        super().__init__(steps=steps, lr=lr, **kwargs)
        check_least(1, rank=rank)
        check_positive(alpha=alpha)
        _peft(type(self).__name__)
        self.rank, self.alpha, self.seed = rank, alpha, seed
        self.held: dict[str, Tensor] = {}

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / self.rank

    def lessons(self, request: EditRequest) -> list[Lesson]:
        """Return the prompt with its target."""
        return [target_lesson(*continuation(self.tokenizer, request.text, request.target_new))]

    # ---- the adapter -------------------------------------------------------------------------------------------------

    def learner(self, start: Deltas) -> Learner:
        """Return the adapter as the last edit left it."""
        tuner, layers = self._tuner()
        for name, factor in self.held.items():
            kind, _, layer = name.partition(".")
            factors(layers[int(layer)])[kind].data.copy_(factor)
        return self._learner(tuner, layers, start)

    def _learner(self, tuner: Any, layers: Mapping[int, Any], start: Deltas) -> Learner:
        return _Factors(tuner, layers, start, self.scale)

    def _tuner(self) -> tuple[Any, dict[int, Any]]:
        """Let peft put a new adapter on stand-ins for the edited layers."""
        adapter = self.ledger.adapter
        devices = [adapter.device] if adapter.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            shells = {}  # made in here: a layer draws its first values
            for layer in self.ledger.layers:
                d_out, d_in = adapter.shape(layer)
                shell = nn.Linear(1, 1, bias=False, device=adapter.device, dtype=self.learning_type)
                shell.in_features, shell.out_features = d_in, d_out  # all that peft asks a layer for
                shells[f"layer{layer}"] = shell
            torch.manual_seed(self.seed)
            tuner = self._wrap(nn.ModuleDict(shells), list(shells))
        own = {layer: tuner.model[f"layer{layer}"] for layer in self.ledger.layers}
        return tuner, {layer: module.to(dtype=self.learning_type) for layer, module in own.items()}

    def _wrap(self, shells: nn.ModuleDict, names: list[str]) -> Any:
        peft = _peft(type(self).__name__)
        config = peft.LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=names)
        return peft.LoraModel(shells, {_ADAPTER: config}, _ADAPTER)

    # ---- state -------------------------------------------------------------------------------------------------------

    def increments(self, record: Mapping[str, Tensor]) -> Deltas:
        """Return by how much the product has grown in a step."""
        return {
            n: low_rank_update(record, n, self.scale, "after.") - low_rank_update(record, n, self.scale, "before.")
            for n in self.ledger.layers
        }

    def remember(self, record: Mapping[str, Tensor]) -> None:
        """Keep the factors that a step has left."""
        self.held = {
            name.removeprefix("after."): factor for name, factor in record.items() if name.startswith("after.")
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of the increments and the factors."""
        return {**super().state_dict(), "factors": dict(self.held)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore sums and factors on a prepared editor."""
        super().load_state_dict(state)
        self.held = {name: factor.clone() for name, factor in state["factors"].items()}


class AdaLoRA(LoRA):
    """Fine-tune an AdaLoRA adapter through the stream; see :mod:`lit_edit.editors.gradient.lora_tuning`.

    Args:
        rank: How many directions a layer keeps, on average over the edited layers.
        init_rank: How many it begins with; the product is multiplied by ``alpha / init_rank``.
        warm_up: Share of the steps before the first direction goes.
        settled: Share of the steps after the last one has gone.
        orthogonal: Weight of :func:`orthogonality` in the loss.
        kwargs: As for :class:`LoRA`. The schedule of ranks is made for all ``steps``; the directions that it would yet
            have let go of below ``loss_threshold`` are kept.

    Raises:
        NotHereError: If ``peft`` is not installed.
    """

    about: ClassVar[EditorInfo] = replace(LoRA.about, title="AdaLoRA", paper="AdaLoRA, 2303.10512")
    depends_on = "init_rank warm_up settled orthogonal"

    def __init__(
        self,
        rank: int = 8,
        init_rank: int = 12,
        warm_up: float = 0.2,
        settled: float = 0.3,
        orthogonal: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(rank=rank, **kwargs)
        if not rank <= init_rank:
            raise ValueError(f"init_rank must not be below rank, got {init_rank} and {rank}")
        if warm_up < 0 or settled < 0 or int(warm_up * self.steps) >= self.steps - int(settled * self.steps):
            raise ValueError(f"warm_up and settled must leave steps between them, got {warm_up} and {settled}")
        check_not_negative(orthogonal=orthogonal)
        self.init_rank, self.warm_up, self.settled, self.orthogonal = init_rank, warm_up, settled, orthogonal

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / (self.init_rank + 1e-5)  # as peft has it

    def _wrap(self, shells: nn.ModuleDict, names: list[str]) -> Any:
        peft = _peft(type(self).__name__)
        config = peft.AdaLoraConfig(
            init_r=self.init_rank,
            target_r=self.rank,
            tinit=int(self.warm_up * self.steps),
            tfinal=int(self.settled * self.steps),
            total_step=self.steps,
            lora_alpha=self.alpha,
            orth_reg_weight=self.orthogonal,
            target_modules=names,
        )
        return peft.AdaLoraModel(shells, {_ADAPTER: config}, _ADAPTER)

    def _learner(self, tuner: Any, layers: Mapping[int, Any], start: Deltas) -> Learner:
        return _Allocated(tuner, layers, start, self.scale)


def _peft(editor: str) -> Any:
    """Return the package that makes adapters; it is not needed for anything else."""
    return import_extra("peft", editor)
