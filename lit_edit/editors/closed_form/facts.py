"""What edits are made of in closed form, layer by layer: keys, residuals, and the targets they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Facts:
    """Facts of some edits, one column each, in float64.

    Attributes:
        keys: By layer, ``(d_in, n)``.
        residuals: By layer, ``(d_out, n)``: what the layer's solution is to say to its keys.
        targets: ``(d_model, n)``, the wanted states behind the last edited layer.
        shifts: ``(d_model, n)``, what these add to the states of the model they were fitted on.
        blocks: How many columns were solved together each time; they add up to ``n``.
    """

    keys: Mapping[int, Tensor]
    residuals: Mapping[int, Tensor]
    targets: Tensor
    shifts: Tensor
    blocks: tuple[int, ...]

    def __len__(self) -> int:
        return self.targets.shape[1]

    def columns(self, columns: Sequence[int]) -> Facts:
        """Return some columns, as one block."""
        index = list(columns)
        return Facts(
            {layer: value[:, index] for layer, value in self.keys.items()},
            {layer: value[:, index] for layer, value in self.residuals.items()},
            self.targets[:, index],
            self.shifts[:, index],
            (len(index),),
        )

    def to(self, device: torch.device) -> Facts:
        """Return the facts on another device."""
        keys, residuals = ({n: v.to(device) for n, v in part.items()} for part in (self.keys, self.residuals))
        return Facts(keys, residuals, self.targets.to(device), self.shifts.to(device), self.blocks)

    def as_tensors(self) -> dict[str, Tensor]:
        """Return the facts for the journal."""
        tensors = {"targets": self.targets, "shifts": self.shifts, "blocks": torch.tensor(self.blocks)}
        for layer in self.keys:
            tensors[f"keys.{layer}"], tensors[f"residuals.{layer}"] = self.keys[layer], self.residuals[layer]
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], device: torch.device) -> Facts:
        """Restore :meth:`as_tensors`."""
        layers = sorted(int(name.partition(".")[2]) for name in tensors if name.startswith("keys."))
        facts = cls(
            {layer: tensors[f"keys.{layer}"] for layer in layers},
            {layer: tensors[f"residuals.{layer}"] for layer in layers},
            tensors["targets"],
            tensors["shifts"],
            tuple(tensors["blocks"].tolist()),
        )
        return facts.to(device)


def join_facts(parts: Sequence[Facts]) -> Facts:
    """Return facts side by side; the blocks stay what they were."""
    first = parts[0]
    return Facts(
        {layer: torch.cat([part.keys[layer] for part in parts], 1) for layer in first.keys},
        {layer: torch.cat([part.residuals[layer] for part in parts], 1) for layer in first.keys},
        torch.cat([part.targets for part in parts], 1),
        torch.cat([part.shifts for part in parts], 1),
        tuple(size for part in parts for size in part.blocks),
    )
