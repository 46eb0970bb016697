"""Where and in which type the algebra of edits is done, whatever the model's device and type are.

Solves, sums and updates are float64: an edit is a small difference of large numbers. A device without float64 (Apple's
MPS) hands its numbers to the CPU for that; float32 would leave a least-squares problem as ill-conditioned as key
statistics are with few digits. What moves is small: the keys of an edit, and a weight when it is written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


@cache
def supports_float64(kind: str) -> bool:
    """Tell whether a kind of device (``torch.device.type``) computes in float64; tried once per process."""
    try:
        numbers = torch.ones(2, 2, dtype=torch.float64, device=kind)
        return (numbers @ numbers).dtype == torch.float64
    except (TypeError, RuntimeError, AssertionError):  # MPS raises the first, a build without the kernels the others
        return False


def algebra_device(device: torch.device) -> torch.device:
    """Return where to compute with what lies on a device: there, or on the CPU if it has no float64."""
    if device.type == "cpu" or supports_float64(device.type):
        return device
    _warn(
        f"{device.type} has no float64: key statistics and solves are kept on the CPU (in host memory), passes of the "
        f"model stay on {device.type}"
    )
    return torch.device("cpu")


def algebra_dtype(device: torch.device) -> torch.dtype:
    """Return the type to compute in with what lies on a device: float64, or float32 if even the CPU has no better."""
    if supports_float64(algebra_device(device).type):
        return torch.float64
    _warn(
        "this build of PyTorch has no float64 on the CPU: key statistics and solves are float32. Edits lose accuracy, "
        "and long streams more of it: use a build with float64 (any from pytorch.org)"
    )
    return torch.float32


def for_algebra(tensor: Tensor) -> Tensor:
    """Return a tensor where and in the type in which the algebra of edits is done; itself if it is there already.

    Example:
        >>> for_algebra(torch.ones(2, dtype=torch.bfloat16)).dtype
        torch.float64
    """
    place = algebra_device(tensor.device)
    return tensor.to(place).to(algebra_dtype(place))  # in this order: the device may not know the type


def without_autocast(*devices: torch.device) -> AbstractContextManager[object]:
    """Return a context in which products on some devices have the type of their factors.

    Autocast (``precision=bf16-mixed``) is for passes of the model. It leaves float64 alone, but would compute products
    of float32 matrices in bfloat16.

    Example:
        >>> ones = torch.ones(2, 2)
        >>> with torch.autocast("cpu", torch.bfloat16), without_autocast(ones.device):
        ...     (ones @ ones).dtype
        torch.float32
    """
    stack = ExitStack()
    for kind in {device.type for device in devices}:
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


def outside_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function of tensors compute in their types, whatever autocast says (:func:`without_autocast`)."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with without_autocast(*(a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor))):
            return function(*args, **kwargs)

    return run


@cache
def _warn(text: str) -> None:
    """Warn once per process."""
    log.warning(text)
