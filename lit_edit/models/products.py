"""Which kernel multiplies float32 matrices on a CPU: decided by a short measurement, kept for the machine.

PyTorch has two, MKL's (its default) and oneDNN's, and on some processors one is twice as fast as the other. oneDNN's is
reached by allowing float32 products to be computed in bfloat16; processors without matrix units for bfloat16 use its
float32 kernel nevertheless. Whether this one does is measured, not assumed: a kernel whose error is not that of float32
is not taken, however fast. Other devices keep their default, which is float32 throughout.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch

from lit_edit.files.paths import cache_dir, write_json

Kernel = Literal["torch", "onednn"]
Products = Literal["auto", "torch", "onednn"]
"""``auto`` takes the faster kernel, ``torch`` PyTorch's default, ``onednn`` oneDNN's."""

_WORTH = 1.15  # how much faster another kernel must be: times are noisy, and results differ in round-off


@dataclass(frozen=True)
class KernelMeasurement:
    """Floating-point operations per second, the best of some tries, and relative error (Frobenius) to float64."""

    rate: float
    error: float


Measured = Mapping[str, KernelMeasurement]


@contextmanager
def use_kernel(kernel: Kernel) -> Iterator[None]:
    """Multiply float32 matrices with a kernel, inside this context.

    A precision that the user has chosen for the whole process (``torch.set_float32_matmul_precision``) is left alone.
    """
    if kernel == "torch" or not _is_default():
        yield
        return
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def _is_default() -> bool:
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # chosen per backend, which this older way of asking refuses to sum up
        return False


def measure_kernels(tokens: int = 512, d_in: int = 576, d_out: int = 1536, tries: int = 8) -> Measured:
    """Time each kernel, and bfloat16, on one product of the size that target optimisation makes; some 0.05 s."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, d_in, generator=generator) for n in (tokens, d_out))
    exact = left[:64].double() @ right.double().T
    measured = {}
    for name in ("torch", "onednn", "bfloat16"):
        pair = (left.bfloat16(), right.bfloat16()) if name == "bfloat16" else (left, right)
        with use_kernel("onednn" if name == "onednn" else "torch"):
            best = float("inf")
            for _ in range(tries):
                start = perf_counter()
                product = torch.nn.functional.linear(*pair)
                best = min(best, perf_counter() - start)
        error = float((product[:64].double() - exact).norm() / exact.norm())
        measured[name] = KernelMeasurement(2 * tokens * d_in * d_out / best, error)
    return measured


def fastest_accurate(measured: Measured) -> Kernel:
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


def choose_kernel(threads: int) -> Kernel:
    """Return the kernel for float32 on this machine, with so many threads."""
    return fastest_accurate(kept_measurement(threads, cache_dir() / "products.json"))


def bfloat16_pays(threads: int) -> bool:
    """Tell whether products in bfloat16 are clearly faster on this machine than any exact one."""
    measured = kept_measurement(threads, cache_dir() / "products.json")
    return measured["bfloat16"].rate > _WORTH * max(measured["torch"].rate, measured["onednn"].rate)


@cache
def kept_measurement(threads: int, file: Path) -> Measured:
    """Return what was measured on this machine with so many threads, from a JSON file where possible.

    Runs that share the file make the same choice and so the same round-off. A damaged one is written anew, one that
    cannot be written is done without.
    """
    machine = f"{_processor()}, torch {torch.__version__}, {threads} threads"
    kept: dict[str, Any] = {}
    with suppress(OSError, ValueError, TypeError):
        kept = dict(json.loads(file.read_text(encoding="utf-8")))
    with suppress(KeyError, TypeError, AttributeError):
        names = ("torch", "onednn", "bfloat16")
        return {name: KernelMeasurement(**{k: float(v) for k, v in kept[machine][name].items()}) for name in names}
    measured = measure_kernels()
    kept[machine] = {name: vars(value) for name, value in measured.items()}
    with suppress(OSError):
        write_json(file, kept)
    return measured


def _processor() -> str:
    with suppress(Exception):  # private to PyTorch, and new
        return f"{torch.cpu.get_capabilities()['cpu_name']} {torch.backends.cpu.get_cpu_capability()}"
    return platform.processor() or platform.machine()
