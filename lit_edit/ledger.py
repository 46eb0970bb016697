"""The ledger: the only object that writes weights.

It keeps the original values of the touched weights and every committed update. A commit writes all layers or none, and
only finite values; a weight is always ``cast(W0 + delta)``, so low-precision models lose nothing by accumulation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lit_edit.models.adapter import ModelAdapter


class EditRefusedError(ValueError):
    """A commit that would have written something it must not; the weights are as they were."""


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


@dataclass(frozen=True)
class LedgerEntry:
    """What is on record about one committed edit; numbers and text only."""

    id: str
    subject: str
    prompt: str
    target_new: str
    facts: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the entry as primitives."""
        return {
            "id": self.id,
            "subject": self.subject,
            "prompt": self.prompt,
            "target_new": self.target_new,
            **{name: float(value) for name, value in self.facts.items()},
        }


class EditLedger:
    """Original weights, committed updates, and the one way to write them.

    Args:
        adapter: The model, unedited at this moment.
        layers: The layers that may be written.
    """

    def __init__(self, adapter: ModelAdapter, layers: Sequence[int]) -> None:
        self.adapter = adapter
        self.layers = tuple(layers)
        self.names = {layer: adapter.weight_name(layer) for layer in layers}
        self.base = {self.names[layer]: adapter.own_weight(layer).detach().clone() for layer in layers}
        self.deltas: dict[str, Tensor] = {}
        self.entries: list[LedgerEntry] = []
        self._edited: dict[int, tuple[Tensor, Tensor]] = {}  # the delta last asked for, and the weight

    def __len__(self) -> int:
        return len(self.entries)

    def align(self) -> None:
        """Bring the original weights to the device and type that the model has by now."""
        self._edited.clear()
        for layer, name in self.names.items():
            self.base[name] = self.base[name].to(self.adapter.own_weight(layer))
            if name in self.deltas:
                self.deltas[name] = self.deltas[name].to(self.base[name].device)

    def original(self) -> ModelAdapter:
        """Return a view of the model with its original weights."""
        return self.adapter.with_weights(self.base)

    def edited_weight(self, layer: int, delta: Tensor) -> Tensor:
        """Return ``cast(W0 + delta)`` in the layout of the layer's weight.

        The last answer of each layer is kept: what an editor has looked at is what it commits.
        """
        known = self._edited.get(layer)
        if known is None or known[0] is not delta:
            base = self.base[self.names[layer]]
            weight = (base.double() + self.adapter.to_layout(layer, delta.to(base.device)).double()).to(base.dtype)
            known = self._edited[layer] = (delta, weight)
        return known[1]

    @torch.no_grad()
    def commit(self, updates: Sequence[LayerUpdate], entries: Sequence[LedgerEntry]) -> None:
        """Write the updates of all layers, or nothing.

        Args:
            updates: At most one per layer.
            entries: The edits that these updates carry.

        Raises:
            EditRefusedError: If a layer is not in this ledger, occurs twice, has another shape, or would hold a value
                that is not finite.
        """
        new = self._checked(updates, entries)
        for update in updates:  # nothing below can fail
            self.adapter.own_weight(update.layer).copy_(new[update.name])
            self.deltas[update.name] = update.delta
        self.entries.extend(entries)

    @torch.no_grad()
    def _checked(self, updates: Sequence[LayerUpdate], entries: Sequence[LedgerEntry]) -> dict[str, Tensor]:
        """Return the weights that the updates would write; raise ``EditRefusedError`` if one of them must not be."""
        new: dict[str, Tensor] = {}
        for update in updates:
            if update.layer not in self.names or update.name != self.names[update.layer]:
                raise EditRefusedError(f"{update.name} (layer {update.layer}) is not among the edited weights")
            if update.name in new:
                raise EditRefusedError(f"{update.name} is updated twice in one commit")
            if tuple(update.delta.shape) != self.adapter.shape(update.layer):
                raise EditRefusedError(
                    f"the update of {update.name} must be (d_out, d_in) = {self.adapter.shape(update.layer)}, "
                    f"got {tuple(update.delta.shape)}"
                )
            weight = self.edited_weight(update.layer, update.delta)
            if not torch.isfinite(weight).all():
                edits = ", ".join(repr(entry.id) for entry in entries)
                raise EditRefusedError(f"edit {edits} would write NaN or infinite values into {update.name}; refused")
            new[update.name] = weight
        return new

    @torch.no_grad()
    def restore_base(self) -> None:
        """Put the original weights back and forget all edits."""
        for layer in self.layers:
            self.adapter.own_weight(layer).copy_(self.base[self.names[layer]])
        self.deltas.clear()
        self.entries.clear()

    def layer_norms(self) -> dict[str, dict[str, float]]:
        """Return, per edited parameter, mean |W| before and after, mean |delta|, and the relative Frobenius norm."""
        norms = {}
        for layer, name in self.names.items():
            base = self.base[name].double()
            delta = self.deltas.get(name)
            weight = self.adapter.own_weight(layer).detach().double()
            norms[name] = {
                "mean_abs_before": base.abs().mean().item(),
                "mean_abs_after": weight.abs().mean().item(),
                "mean_abs_delta": 0.0 if delta is None else delta.abs().mean().item(),
                "relative_change": 0.0 if delta is None else (delta.norm() / base.norm().to(delta.device)).item(),
            }
        return norms

    def state_dict(self) -> dict[str, Any]:
        """Return updates and entries as tensors and primitives; the tensors are the ledger's own."""
        return {
            "deltas": dict(self.deltas),
            "entries": [entry.as_dict() for entry in self.entries],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Write the saved updates and restore the entries, or change nothing.

        Raises:
            EditRefusedError: If the saved updates do not fit this model or these layers.
        """
        by_name = {name: layer for layer, name in self.names.items()}
        unknown = sorted(set(state["deltas"]) - set(by_name))
        if unknown:
            raise EditRefusedError(
                f"the checkpoint edits {', '.join(unknown)}, this stream edits layers {list(self.layers)}; "
                "use the config that the checkpoint was made with"
            )
        entries = []
        for saved in state["entries"]:
            facts = dict(saved)
            text = {key: str(facts.pop(key)) for key in ("id", "subject", "prompt", "target_new")}
            entries.append(LedgerEntry(**text, facts=facts))
        updates = [
            LayerUpdate(by_name[name], name, delta.to(self.base[name].device))
            for name, delta in state["deltas"].items()
        ]
        self._checked(updates, entries)
        self.restore_base()
        self.commit(updates, entries)
