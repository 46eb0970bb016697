"""Sizes of the testbed's decoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Size of a decoder."""

    hidden: int  # width
    layers: int  # depth
    heads: int  # of attention
    inner: int  # width of the MLP


PRESETS: Mapping[str, Shape] = {
    "base": Shape(512, 4, 4, 1024),  # 11 million parameters
    "small": Shape(256, 4, 4, 768),  # 3.6 million
    "tiny": Shape(128, 4, 4, 512),  # 1.1 million
    "micro": Shape(32, 2, 2, 64),  # for tests
}
"""By name."""
