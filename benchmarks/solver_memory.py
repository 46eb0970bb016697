"""One layer of a large model in the solver: memory and time, by type of P and place of the statistics.

    python benchmarks/solver_memory.py --json solver_memory.json
    python benchmarks/solver_memory.py --d-in 4096 --d-out 1024       # seconds

Each variant runs in a process of its own: a solver for a synthetic layer of Llama-3-8B's size, some edits with a fold
among them, one factorisation anew. Resident memory is read from the kernel after each; the pages of memory-mapped files
are given apart, since the kernel takes those back when it needs memory. Solutions are compared with those of the first
variant, which keeps everything in float64 and in memory. Needs Linux (/proc) and about 12 GB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

VARIANTS = (("float64", "none"), ("float32", "none"), ("float64", "disk"), ("float32", "disk"))


def resident() -> dict[str, float]:
    """GB of this process: anonymous, of files, and the most of both so far."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"anonymous": "RssAnon", "files": "RssFile", "shared": "RssShmem", "peak": "VmHWM"}
    return {ours: int(lines[theirs].split()[0]) / 1e6 for ours, theirs in names.items()}


def measure(d_in: int, d_out: int, edits: int, inverse: Any, offload: Any, folder: str | None) -> dict[str, Any]:
    import torch

    from lit_edit.solvers.recursive_least_squares import RidgeSolver
    from lit_edit.solvers.storage import SolverStorage

    generator = torch.Generator().manual_seed(0)
    before = resident()["anonymous"]
    prior = torch.eye(d_in, dtype=torch.float64) * 20.0
    start = perf_counter()
    solver = RidgeSolver(prior, d_out, fold_every=edits // 2, storage=SolverStorage(inverse, offload, folder))
    del prior
    factorised = perf_counter() - start
    scale = torch.logspace(0.5, -1.0, d_in, dtype=torch.float64)[:, None]
    spent = []
    for _ in range(edits):
        key = torch.randn(d_in, 1, generator=generator, dtype=torch.float64) * scale
        residual = torch.randn(d_out, 1, generator=generator, dtype=torch.float64)
        start = perf_counter()
        solver.update(key, residual)
        spent.append(perf_counter() - start)
    after = resident()
    sample = solver.delta[:: max(1, d_out // 16)].clone()
    drift = solver.drift()
    start = perf_counter()
    solver.refactorise()
    anew = perf_counter() - start
    exact = solver.delta[:: max(1, d_out // 16)]
    return {
        "inverse": inverse,
        "offload": offload,
        "anonymous_gb": after["anonymous"] - before,
        "files_gb": after["files"] + after["shared"],
        "peak_gb": after["peak"],
        "seconds_factorised": factorised,
        "seconds_per_edit": sorted(spent)[len(spent) // 2],
        "seconds_fold": max(spent),
        "seconds_refactorised": anew,
        "drift": drift,
        "error": float((sample - exact).norm() / exact.norm()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=14336)
    parser.add_argument("--d-out", type=int, default=4096)
    parser.add_argument("--edits", type=int, default=16, help="folded in two halves")
    parser.add_argument("--folder", default=None, help="for memory-mapped files; by default in lit-edit's cache")
    parser.add_argument("--variant", type=int, default=None, help="run only this one, and print it as JSON")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    if options.variant is not None:
        inverse, offload = VARIANTS[options.variant]
        row = measure(options.d_in, options.d_out, options.edits, inverse, offload, options.folder)
        sys.stdout.write(json.dumps(row))
        return
    print(f"d_in {options.d_in}, d_out {options.d_out}; GB in memory, of mapped files, at the peak; seconds")
    print(f"{'P':9s}{'offload':9s}{'memory':>9s}{'files':>9s}{'peak':>9s}{'edit':>9s}{'fold':>9s}{'factor':>9s}"
          f"{'drift':>10s}{'error':>10s}")  # fmt: skip
    rows = []
    for number in range(len(VARIANTS)):
        command = [sys.executable, __file__, "--variant", str(number), "--edits", str(options.edits),
                   "--d-in", str(options.d_in), "--d-out", str(options.d_out)]  # fmt: skip
        command += ["--folder", options.folder] if options.folder else []
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append(row)
        print("{inverse:9s}{offload:9s}{anonymous_gb:9.2f}{files_gb:9.2f}{peak_gb:9.2f}{seconds_per_edit:9.3f}"
              "{seconds_fold:9.2f}{seconds_refactorised:9.1f}{drift:10.1e}{error:10.1e}"
              .format(**row), flush=True)  # fmt: skip
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
