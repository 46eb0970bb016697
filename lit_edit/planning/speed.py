"""What this machine can do, measured in a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from lit_edit.errors import ArgumentError
from lit_edit.files.paths import cache_dir
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.products import fastest_accurate, kept_measurement


@dataclass(frozen=True)
class Measured:
    """What plans are made of."""

    rate: float  # operations per second of matrix products in the type of the weights
    short: float  # the same in bfloat16
    bandwidth: float  # bytes per second to and from the memory
    host: float  # operations per second of products in float64 on the host


def measure_speed(adapter: ModelAdapter, dtype: torch.dtype, gpu: bool) -> Measured:
    """Measure a device of this machine, with the products that the model would choose."""
    device = torch.accelerator.current_accelerator() if gpu and torch.accelerator.is_available() else None
    if gpu and device is None:
        raise ArgumentError("there is no GPU here to be measured: give the rate of one device with --tflops, say 400")
    cpu = torch.device("cpu")
    host = product_rate(cpu, torch.float64, 1024)
    if device is not None:
        rate, short = (product_rate(device, kind, 8192) for kind in (dtype, torch.bfloat16))
        return Measured(rate, short, bandwidth(device), host)
    return Measured(_cpu_rate(adapter, dtype), _cpu_rate(adapter, torch.bfloat16), bandwidth(cpu), host)


def _cpu_rate(adapter: ModelAdapter, dtype: torch.dtype) -> float:
    """Return the rate of the products that a run would use."""
    measured = kept_measurement(torch.get_num_threads(), cache_dir() / "products.json")
    if dtype == torch.bfloat16:
        return measured["bfloat16"].rate
    if dtype != torch.float32:
        return product_rate(torch.device("cpu"), dtype, 1024)
    return measured[fastest_accurate(measured) if adapter.products == "auto" else adapter.products].rate


def product_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Return the operations per second of a product of square matrices."""
    one = torch.ones(size, size, dtype=dtype, device=device)
    return 2.0 * size**3 / _least_seconds(lambda: one @ one)


def bandwidth(device: torch.device, size: int = 1 << 24) -> float:
    """Return the bytes per second of a copy, read and written."""
    source = torch.ones(size, device=device)
    target = torch.empty_like(source)
    return 2.0 * source.nbytes / _least_seconds(lambda: target.copy_(source))


def _least_seconds(work: Callable[[], Tensor], tries: int = 4) -> float:
    least = float("inf")
    for _ in range(tries):
        start = perf_counter()
        work().view(-1)[0].item()  # waits until a device is done
        least = min(least, perf_counter() - start)
    return least
