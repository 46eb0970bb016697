"""Which kernel multiplies float32 matrices on a CPU: decided by a short measurement, kept for the machine.

PyTorch has two, MKL's (its default) and oneDNN's, and on some processors one is twice as fast as the other. oneDNN's is
reached by allowing float32 products to be computed in bfloat16; processors without matrix units for bfloat16 use its
float32 kernel nevertheless. Whether this one does is measured, not assumed: a kernel whose error is not that of float32
is not taken, however fast. Other devices keep their default, which is float32 throughout.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, get_args

import torch

from lit_edit.paths import cache_dir, write_json

Kernel = Literal["torch", "onednn"]
Products = Literal["auto", "torch", "onednn"]
"""``auto`` takes the faster kernel, ``torch`` PyTorch's default, ``onednn`` oneDNN's."""

_PRECISION = {"torch": "highest", "onednn": "medium"}
_WORTH = 1.15  # how much faster another kernel must be: times are noisy, and results differ in round-off


@dataclass(frozen=True)
class KernelMeasurement:
    """What was measured of one kernel.

    Attributes:
        rate: Floating-point operations per second, the best of some tries.
        error: Relative error of a product (Frobenius) against float64.
    """

    rate: float
    error: float


@contextmanager
def use_kernel(kernel: Kernel) -> Iterator[None]:
    """Multiply float32 matrices with a kernel, inside this context.

    A precision that the user has chosen for the whole process (``torch.set_float32_matmul_precision``) is left alone.
    """
    if kernel == "torch" or not _is_default():
        yield
        return
    torch.set_float32_matmul_precision(_PRECISION[kernel])
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def _is_default() -> bool:
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # chosen per backend, which this older way of asking refuses to sum up
        return False


def measure_kernels(tokens: int = 512, d_in: int = 576, d_out: int = 1536, tries: int = 8) -> dict[str, Any]:
    """Time each kernel on one product of the size that target optimisation makes; takes a few hundredths of a second.

    Returns:
        By kernel, a :class:`KernelMeasurement`.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, d_in, generator=generator) for n in (tokens, d_out))
    exact = left[:64].double() @ right.double().T
    measured = {}
    for kernel in get_args(Kernel):
        with use_kernel(kernel):
            best = float("inf")
            for _ in range(tries):
                start = perf_counter()
                product = torch.nn.functional.linear(left, right)
                best = min(best, perf_counter() - start)
        error = float((product[:64].double() - exact).norm() / exact.norm())
        measured[kernel] = KernelMeasurement(2 * tokens * d_in * d_out / best, error)
    return measured


def fastest_accurate(measured: dict[str, KernelMeasurement]) -> Kernel:
    """Return the kernel to use: the default unless another one is clearly faster and as accurate as float32 is.

    Example:
        >>> default, other = KernelMeasurement(2e11, 2.5e-7), KernelMeasurement(4.8e11, 3.9e-7)
        >>> fastest_accurate({"torch": default, "onednn": other})
        'onednn'
        >>> fastest_accurate({"torch": default, "onednn": KernelMeasurement(9e11, 2e-3)})  # that is bfloat16
        'torch'
    """
    default, other = measured["torch"], measured["onednn"]
    accurate = other.error < 4 * max(default.error, torch.finfo(torch.float32).eps)
    return "onednn" if accurate and other.rate > _WORTH * default.rate else "torch"


@cache
def choose_kernel(threads: int, cache_file: Path | None = None) -> Kernel:
    """Return the kernel for this machine, measured once and kept in the cache (``products.json``).

    Args:
        threads: How many threads PyTorch uses.
        cache_file: Where to keep the measurement.
    """
    file = cache_file or cache_dir() / "products.json"
    machine = f"{_processor()}, torch {torch.__version__}, {threads} threads"
    kept: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        kept = dict(json.loads(file.read_text(encoding="utf-8")))
    with suppress(KeyError, TypeError):
        if kept[machine]["kernel"] in get_args(Kernel):
            kernel: Kernel = kept[machine]["kernel"]
            return kernel
    if not torch.backends.mkldnn.is_available():
        return "torch"
    measured = measure_kernels()
    kernel = fastest_accurate(measured)
    kept[machine] = {"kernel": kernel} | {name: vars(value) for name, value in measured.items()}
    with suppress(OSError):  # a cache that cannot be written costs the measurement, not the run
        write_json(file, kept)
    return kernel


def _processor() -> str:
    with suppress(Exception):  # private to PyTorch, and new
        return f"{torch.cpu.get_capabilities()['cpu_name']} {torch.backends.cpu.get_cpu_capability()}"
    return platform.processor() or platform.machine()
