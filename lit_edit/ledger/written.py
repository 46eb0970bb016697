"""The weights that a ledger writes: as they were, as it left them, and whether they are so still."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_edit.devices.algebra import algebra_device, for_algebra
from lit_edit.ledger.ownership import Untouched, WeightsChangedError, difference, owner_of, print_of
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.shards import holds, whole, write_


@dataclass(frozen=True)
class LayerUpdate:
    """The whole update of one layer relative to the original weights.

    Attributes:
        layer: Number of the decoder layer.
        name: Full name of the parameter.
        delta: ``(d_out, d_in)``, float64, whatever layout the model stores the weight in.
    """

    layer: int
    name: str
    delta: Tensor


class WrittenWeights:
    """The edited weights of a model. A weight is always ``cast(W0 + delta)``, and nobody else's.

    Args:
        adapter: The model, unedited at this moment.
        layers: The layers that may be written.

    Attributes:
        names: Of the parameters, by layer.
        base: The original weights, by name.
        written: The weights as they were left, by name.
        deltas: What was added to them, ``(d_out, d_in)``, float64.
        prints: Digits for the bits of every parameter, as the model was.
    """

    def __init__(self, adapter: ModelAdapter, layers: Sequence[int]) -> None:
        self.adapter = adapter
        self.layers = tuple(layers)
        self.names = {layer: adapter.weight_name(layer) for layer in layers}
        self.base = {self.names[layer]: whole(adapter.own_weight(layer).detach()).clone() for layer in layers}
        self.written = dict(self.base)
        self.deltas: dict[str, Tensor] = {}
        self._untouched = Untouched(adapter.model, self.names.values())
        self.prints = {**self._untouched.prints, **{name: print_of(weight) for name, weight in self.base.items()}}
        self._edited: dict[int, tuple[Tensor, Tensor]] = {}  # the delta last asked for, and the weight

    @property
    def held(self) -> int:
        """How many edits the model holds; at least one if it computes with anything but its original weights."""
        changed = any(not torch.equal(self.written[name], base) for name, base in self.base.items())
        return int(changed or self.adapter.memory is not None)

    @torch.no_grad()
    def verify(self, thorough: bool = False) -> None:
        """Check that the model is as this ledger left it; every rank must ask.

        Args:
            thorough: Read the weights that are not edited too, even if PyTorch has counted no operation on them.

        Raises:
            WeightsChangedError: If it is not; names the parameters.
        """
        owner = owner_of(self.adapter.model)
        if owner is None or owner.ledger is not self:
            raise WeightsChangedError(
                "this model has another ledger by now (another stream, or another call, edits it): go on with that one"
            )
        changed = [name for layer, name in self.names.items() if not self._as_written(layer)]
        restorable = bool(changed)
        if thorough or not self.adapter.sharded:
            others = self._untouched.changed(self.adapter.model, thorough)
            changed, restorable = changed + others, restorable and not others
        if self.adapter.ranks.together:
            changed = sorted({name for names in self.adapter.ranks.gather(changed) for name in names})
        if changed:
            raise WeightsChangedError(difference(changed, restorable), changed)

    def _as_written(self, layer: int) -> bool:
        own, written = self.adapter.own_weight(layer), self.written[self.names[layer]]
        return holds(own, written.to(own.device))

    @torch.no_grad()
    def rewrite(self) -> None:
        """Put the weights of the edited layers back as this ledger left them, whoever has written them since.

        Raises:
            WeightsChangedError: If others were changed as well, of which no copy is kept.
        """
        for layer, name in self.names.items():
            write_(self.adapter.own_weight(layer), self.written[name])
        self.verify(thorough=True)

    @torch.no_grad()
    def align(self) -> None:
        """Bring the original weights to the device and type that the model has by now, and write the edits into it.

        Raises:
            WeightsChangedError: If somebody has written the model's weights meanwhile.
        """
        moved = [
            name
            for layer, name in self.names.items()
            if (own := self.adapter.own_weight(layer)).dtype != self.base[name].dtype
            or own.device != self.base[name].device
        ]
        if not moved:
            self.verify(thorough=True)
            return
        self._edited.clear()
        for layer, name in self.names.items():
            own = self.adapter.own_weight(layer)
            rounded = own.dtype != self.base[name].dtype
            self.base[name] = self.base[name].to(own.device, own.dtype)
            self.written[name] = self.written[name].to(own.device, own.dtype)
            if name not in self.deltas:
                continue
            delta = self.deltas[name] = self.deltas[name].to(algebra_device(own.device))
            if rounded and self._as_written(layer):
                # cast(W0 + D) has been cast once more, and rounding twice is not rounding once
                self.written[name] = self.edited_weight(layer, delta)
                write_(own, self.written[name])
        self._untouched = Untouched(self.adapter.model, self.names.values())
        self.verify()

    def original(self) -> ModelAdapter:
        """Return a view of the model with its original weights, and without what an editor keeps beside them."""
        return self.adapter.with_weights(self.base).with_memory(None)

    def preview(self, updates: Sequence[LayerUpdate]) -> ModelAdapter:
        """Return a view of the model with other updates than those that are written."""
        weights = {update.name: self.edited_weight(update.layer, update.delta) for update in updates}
        return self.adapter.with_weights({**self.base, **weights})

    def edited_weight(self, layer: int, delta: Tensor) -> Tensor:
        """Return ``cast(W0 + delta)`` in the layout of the layer's weight.

        The last answer of each layer is kept: what an editor has looked at is what it commits.
        """
        known = self._edited.get(layer)
        if known is None or known[0] is not delta:
            base = self.base[self.names[layer]]
            exact = for_algebra(base)
            weight = (exact + self.adapter.to_layout(layer, delta.to(exact))).to(base.dtype).to(base.device)
            known = self._edited[layer] = (delta, weight)
        return known[1]

    def layer_norms(self) -> dict[str, dict[str, float]]:
        """Return, per edited parameter, mean |W| before and after, mean |delta|, and the relative Frobenius norm."""
        norms = {}
        for layer, name in self.names.items():
            base = for_algebra(self.base[name])
            delta = self.deltas.get(name)
            weight = base if delta is None else for_algebra(self.edited_weight(layer, delta))
            norms[name] = {
                "mean_abs_before": base.abs().mean().item(),
                "mean_abs_after": weight.abs().mean().item(),
                "mean_abs_delta": 0.0 if delta is None else delta.abs().mean().item(),
                "relative_change": 0.0 if delta is None else (delta.norm() / base.norm().to(delta.device)).item(),
            }
        return norms

    def _write(self, update: LayerUpdate, weight: Tensor) -> None:
        write_(self.adapter.own_weight(update.layer), weight)
        self._edited[update.layer] = (update.delta, weight)
        self.written[update.name], self.deltas[update.name] = weight, update.delta

    def _write_base(self) -> None:
        for layer, name in self.names.items():
            write_(self.adapter.own_weight(layer), self.base[name])
        self.written = dict(self.base)
        self.deltas.clear()
