"""Which earlier edits have nearly the key of a new one: such edits get in each other's way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_edit.devices.algebra import without_autocast

_WIDTH = 256


class KeyIndex:
    """Directions of keys ``(d_in,)``, in a kilobyte each whatever their dimension.

    Keys are kept as random projections (signs drawn once), which keep angles: a cosine near 1 is known to a few
    thousandths, one near 0 to a few hundredths (Johnson-Lindenstrauss).

    Example:
        >>> index = KeyIndex(8)
        >>> index.add([1, 2], torch.eye(8)[:, :2])
        >>> number, cosine = index.nearest(3 * torch.eye(8)[:, 1])[0]
        >>> number, round(cosine, 3)
        (2, 1.0)
    """

    def __init__(self, d_in: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._signs = (torch.rand(d_in, _WIDTH, generator=generator) < 0.5).float() * 2 - 1
        self.numbers: list[int] = []
        self._sketches = torch.empty(0, _WIDTH, dtype=torch.float32)

    def add(self, numbers: Sequence[int], keys: Tensor) -> None:
        """Add the keys ``(d_in, n)`` of some edits."""
        if not numbers:
            return
        self.numbers += numbers
        self._sketches = torch.cat([self._sketches, self._sketch(keys)])

    def remove(self, numbers: Sequence[int]) -> None:
        """Forget some edits."""
        if not numbers:
            return
        gone = set(numbers)
        kept = [row for row, number in enumerate(self.numbers) if number not in gone]
        self.numbers, self._sketches = [self.numbers[row] for row in kept], self._sketches[kept]

    def nearest(self, key: Tensor, count: int = 8) -> list[tuple[int, float]]:
        """Return the edits whose keys are nearest to a key ``(d_in,)``, with their cosines, nearest first."""
        if not self.numbers:
            return []
        sketch = self._sketch(key[:, None])[0]
        with without_autocast(sketch.device):
            cosines = self._sketches @ sketch
        best = cosines.topk(min(count, len(cosines)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [(self.numbers[row], cosine) for row, cosine in pairs]

    def _sketch(self, keys: Tensor) -> Tensor:
        with without_autocast(self._signs.device):
            sketches = keys.detach().float().cpu().T @ self._signs
        return torch.nn.functional.normalize(sketches, dim=1)

    def state_dict(self) -> dict[str, Any]:
        """Return the numbers and sketches."""
        return {"numbers": list(self.numbers), "sketches": self._sketches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.numbers, self._sketches = list(state["numbers"]), state["sketches"].clone()
