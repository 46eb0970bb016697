"""Digests: of a tensor's bits, computed where the tensor is, and seeds made of anything printable."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def checksum(weight: Tensor) -> str:
    """Return digits that change when any bit of a tensor does (not against malice); computed where the tensor is.

    Example:
        >>> one, other = torch.zeros(2, 2), torch.zeros(2, 2)
        >>> other[1, 0] = 1e-30
        >>> checksum(one) == checksum(torch.zeros(2, 2)), checksum(one) == checksum(other)
        (True, False)
    """
    words = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[weight.element_size()]
    bits = weight.detach().contiguous().view(words).reshape(weight.shape[0], -1)
    places = torch.arange(1, bits.shape[1] + 1, device=bits.device, dtype=torch.int64)
    digest = torch.zeros(2, dtype=torch.int64, device=bits.device)
    for first in range(0, len(bits), 256):  # a block of rows at a time: integers of 64 bits take twice the room
        block = bits[first : first + 256].long()
        rows = torch.arange(first + 1, first + 1 + len(block), device=bits.device, dtype=torch.int64)
        sums = torch.stack([block.sum(1), (block * places).sum(1)])  # overflow wraps, which is as good
        digest = digest * 1_000_003 + (sums * rows).sum(1)
    return "".join(f"{value & (1 << 64) - 1:016x}" for value in digest.tolist())


def digest_of(value: Tensor) -> str:
    """Return digits that change with any bit of a tensor in host memory, with its type and with its shape.

    Example:
        >>> digest_of(torch.zeros(2)) == digest_of(-torch.zeros(2))
        False
    """
    whole = hashlib.sha256(f"{value.dtype} {tuple(value.shape)} ".encode())
    if value.numel():
        whole.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()[:16]


def hash_seed(*parts: object) -> int:
    """Derive a 63-bit seed from anything printable, the same on every machine."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
