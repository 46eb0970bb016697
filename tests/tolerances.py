"""How near is near: what rounding alone may make of the same numbers, by family of models and by kind of comparison.

Bits are asked for where the code promises them: the same operations on the same shapes in one process or another (a
journal done again, a run taken up, ranks that compute alike). In another shape (other rows beside one, padding, a
prefix from the cache, more or fewer threads) a matrix product is summed in another order, on some processors and not on
others, and only a tolerance can be asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

DOUBLE_FAMILIES = ("gpt2", "gpt_neox", "opt")
"""A float64 model of these computes in float64 throughout, if its attention is not eager.

All others round to float32 inside, whatever their type: GPT-J its attention scores, and RMSNorm of Llama, Mistral,
Qwen, Gemma and Phi-3 its input. (Rotary tables are float32 too, in all of them, but computed element by element: the
same bits in any shape.) Eager attention takes its softmax in float32.
"""

DOUBLE = 1e-10
"""Of the largest value: float64's 2e-16 after some hundred operations in other orders, times what a gradient through
four layers and the head makes of it."""

SINGLE = 1e-5
"""Of the largest value: float32's 1e-7, likewise; errors of substance are of 1e-2 and more in random models."""


def rounding(family: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa") -> float:
    """Return what two passes of a model over the same tokens may differ by, of the largest value."""
    return DOUBLE if dtype == torch.float64 and family in DOUBLE_FAMILIES and attention == "sdpa" else SINGLE


def assert_near(found: Tensor, expected: Tensor, most: float) -> None:
    """Assert that no entry is off by more than ``most`` of the largest expected one."""
    assert expected.numel()
    torch.testing.assert_close(found, expected, rtol=0, atol=most * float(expected.abs().max()))
