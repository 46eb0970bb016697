"""What an edit costs late in a stream: the solve stays flat, the state does not grow, rounding does not add up.

    python benchmarks/stream_cost.py --json stream_cost.json
    python benchmarks/stream_cost.py --models smollm2-135m --updates 20000      # shorter

Synthetic keys and residuals in layers of real sizes. The cost at edit n is the mean over as many edits as the solver
keeps between two folds, so that each figure holds exactly one of them. To get to edit 1,000 and 10,000 quickly the
facts in between are taken in large blocks. GPT-J's and Llama-3's layers need their size in memory several times
(16384^2 float64 is 2.1 GB): they are made with a diagonal prior, and only up to --large-edits.

The drift of the running inverse is followed over --updates rank-one updates in a layer of 256, where that many can be
made in a minute.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch
from common import make_parser, write_result

from lit_edit.solvers.recursive_least_squares import RidgeSolver

SIZES = {"smollm2-135m": (1536, 576), "gpt-j-6b": (16384, 4096), "llama-3-8b": (14336, 4096)}
MARKS = (10, 100, 1_000, 10_000)


def facts(d_in: int, d_out: int, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys with a few strong directions, as in real layers, and residuals."""
    scale = torch.logspace(0.5, -1.0, d_in, dtype=torch.float64)[:, None]
    keys = torch.randn(d_in, count, generator=generator, dtype=torch.float64) * scale
    return keys, torch.randn(d_out, count, generator=generator, dtype=torch.float64)


def state_bytes(solver: RidgeSolver) -> int:
    return sum(v.numel() * v.element_size() for v in solver.state_dict().values() if isinstance(v, torch.Tensor))


def cost_over_stream(name: str, marks: tuple[int, ...]) -> list[dict[str, Any]]:
    d_in, d_out = SIZES[name]
    generator = torch.Generator().manual_seed(0)
    solver = RidgeSolver(torch.eye(d_in, dtype=torch.float64) * 20.0, d_out)
    period, done, rows = solver.fold_every, 0, []
    for mark in marks:
        while done < mark - mark % period:  # whole folds, in blocks
            block = min(512, mark - mark % period - done)
            solver.update(*facts(d_in, d_out, block, generator))
            done += block
        spent = []
        for _ in range(period):
            keys, residuals = facts(d_in, d_out, 1, generator)
            start = perf_counter()
            solver.update(keys, residuals)
            spent.append(perf_counter() - start)
        done += period
        rows.append({
            "model": name, "edit": mark, "seconds_per_edit": sum(spent) / len(spent),
            "median_seconds": sorted(spent)[len(spent) // 2],
            "state_bytes": state_bytes(solver), "drift": solver.drift(), "refactorisations": solver.refactorisations,
        })  # fmt: skip
        print(f"{name:14s}{d_in:>7d}{mark:>9d}{1e3 * rows[-1]['seconds_per_edit']:12.2f}"
              f"{1e3 * rows[-1]['median_seconds']:12.2f}{rows[-1]['state_bytes'] / 1e6:12.1f}{rows[-1]['drift']:12.1e}",
              flush=True)  # fmt: skip
    return rows


def drift_over_updates(updates: int, d_in: int = 256, d_out: int = 64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    solver = RidgeSolver(torch.eye(d_in, dtype=torch.float64) * 20.0, d_out)
    worst = 0.0
    start = perf_counter()
    for number in range(updates):
        solver.update(*facts(d_in, d_out, 1, generator))
        if number % 997 == 0:
            worst = max(worst, solver.drift())
    exact = RidgeSolver(torch.eye(d_in, dtype=torch.float64) * 20.0 + solver.gram, d_out)
    error = float((solver.inverse - exact.inverse).norm() / exact.inverse.norm())
    solution = solver.cross @ exact.inverse
    return {
        "d_in": d_in,
        "updates": updates,
        "worst_drift": worst,
        "drift_bound": solver.drift_bound,
        "inverse_error": error,
        "solution_error": float((solver.solve() - solution).norm() / solution.norm()),
        "refactorisations": solver.refactorisations,
        "seconds": perf_counter() - start,
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--large-edits", type=int, default=100, help="how far to go in layers of more than 4,096")
    parser.add_argument("--updates", type=int, default=100_000)
    options = parser.parse_args()

    print(
        f"{'layer of':14s}{'d_in':>7s}{'at edit':>9s}{'mean ms':>12s}{'median ms':>12s}{'state MB':>12s}{'drift':>12s}"
    )
    rows = []
    for name in options.models:
        limit = MARKS[-1] if SIZES[name][0] <= 4096 else options.large_edits
        rows += cost_over_stream(name, tuple(mark for mark in MARKS if mark <= limit))
    drift = drift_over_updates(options.updates)
    print(
        f"\n{drift['updates']:,} rank-one updates, d_in {drift['d_in']}: worst drift {drift['worst_drift']:.1e} (bound "
        f"{drift['drift_bound']:.0e}), inverse off by {drift['inverse_error']:.1e}, solution by "
        f"{drift['solution_error']:.1e}, factorised anew {drift['refactorisations']} times, {drift['seconds']:.0f} s"
    )
    write_result(options.json, {"cost": rows, "drift": drift})


if __name__ == "__main__":
    main()
