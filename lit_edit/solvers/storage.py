"""Where a solver keeps its matrices, for layers whose statistics are larger than the memory at hand."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_edit.devices.algebra import algebra_device, algebra_dtype
from lit_edit.errors import check_known
from lit_edit.files.paths import cache_dir, expand


@dataclass(frozen=True)
class SolverStorage:
    """Type and place of the matrices of size ``(d_in, d_in)``.

    Args:
        inverse: Type in which ``P`` is carried along. The sums it follows from are float64 in any case, and so is
            every factorisation; ``float32`` halves ``P`` and what an edit reads (accuracy: docs/memory.md).
        offload: ``cpu`` keeps the solver in host memory when the model is on a GPU (as is done in any case for a device
            without float64); ``disk`` also keeps what is read at folds and factorisations only (prior and sums) in
            memory-mapped files that vanish with the process.
        folder: For those files; by default in lit-edit's cache. A folder in memory (tmpfs) saves nothing.
    """

    inverse: Literal["float64", "float32"] = "float64"
    offload: Literal["none", "cpu", "disk"] = "none"
    folder: str | None = None

    def __post_init__(self) -> None:
        check_known(("float64", "float32"), inverse=self.inverse)
        check_known(("none", "cpu", "disk"), offload=self.offload)

    @property
    def inverse_dtype(self) -> torch.dtype:
        """Type of ``P``."""
        return algebra_dtype(torch.device("cpu")) if self.inverse == "float64" else torch.float32

    def place(self, matrix: Tensor) -> Tensor:
        """Return the matrix where the solver is to live."""
        return matrix.to(algebra_device(matrix.device)) if self.offload == "none" else matrix.cpu()

    def keep(self, matrix: Tensor) -> Tensor:
        """Return the matrix, on disk if it is to be there; writing to it later writes to the file."""
        if self.offload != "disk":
            return matrix
        folder = expand(self.folder) if self.folder else cache_dir() / "scratch"
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix="matrix-", suffix=".part")
        os.close(handle)
        try:
            mapped = torch.from_file(name, shared=True, size=matrix.numel(), dtype=matrix.dtype).view(matrix.shape)
            mapped[:] = matrix
        finally:
            with suppress(OSError):  # elsewhere than on POSIX a mapped file cannot go before its mapping
                os.unlink(name)
        return mapped
