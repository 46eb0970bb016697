"""Sizes of the testbed's decoders."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Shape:
    """Size of a decoder.

    Args:
        hidden: Width.
        layers: Depth.
        heads: Attention heads.
        inner: Width of the MLP.
    """

    hidden: int
    layers: int
    heads: int
    inner: int


PRESETS = MappingProxyType(
    {
        "base": Shape(512, 4, 4, 1024),  # 11 million parameters
        "small": Shape(256, 4, 4, 768),  # 3.6 million
        "tiny": Shape(128, 4, 4, 512),  # 1.1 million
        "micro": Shape(32, 2, 2, 64),  # for tests
    }
)
"""By name."""
