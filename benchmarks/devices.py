"""What several processes gain: the same stream on one process, and on more with a whole model or a part of it each.

    python benchmarks/devices.py                    # one process against two, one thread each
    python benchmarks/devices.py --devices 4 --threads 2 --data counterfact.json

Every run is a ``lit-edit fit`` of its own, with as many threads per process as all others; variants take turns. The
time of each phase is the leader's, from ``summary.json``; the statistics are those of the cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import make_parser, write_result
from safetensors.torch import load_file

PHASES = ("targets", "keys", "solve", "metrics")


def fit(folder: Path, name: str, options: list[str], threads: int) -> dict[str, float]:
    """Run a stream; return seconds by phase."""
    command = [sys.executable, "-m", "lit_edit", "fit", "--config", "quickstart", f"--run_name={name}", *options]
    done = subprocess.run(
        [*command, "--trainer.accelerator=cpu"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr)
    seconds = json.loads((folder / "runs" / name / "summary.json").read_text())["seconds"]
    return {phase: seconds[phase] for phase in PHASES}


def distance(one: Path, other: Path) -> float:
    """Return by how much the updates of two runs differ, relative to their norms, at most."""
    a, b = (load_file(run / "ledger" / "deltas.safetensors") for run in (one, other))
    return max(float((a[name] - b[name]).norm() / a[name].norm()) for name in a)


def main() -> None:
    """Run and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--devices", type=int, default=2, help="processes")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--edits", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each variant; the fastest of each phase counts")
    parser.add_argument("--data", help="CounterFact file; by default the built-in facts")
    args = parser.parse_args()
    common = [f"--data.limit={args.edits}"]
    if args.data:
        common += ["--data.source=file", f"--data.path={Path(args.data).resolve()}"]
    several = [f"--trainer.devices={args.devices}"]
    variants: dict[str, list[str]] = {
        "one process": [],
        "ddp": ["--trainer.strategy=ddp", *several],
        "fsdp2": ["--trainer.strategy=fsdp2", *several],
    }
    best: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for turn in range(args.rounds):
            for number, (variant, options) in enumerate(variants.items()):
                found = fit(folder, f"run-{number}-{turn}", [*common, *options], args.threads)
                known = best.get(variant, found)
                best[variant] = {phase: min(found[phase], known[phase]) for phase in PHASES}
        differ = {name: distance(folder / "runs" / "run-0-0", folder / "runs" / f"run-{number}-0")
                  for number, name in enumerate(variants)}  # fmt: skip
    print(f"{args.edits} edits, {args.devices} processes of {args.threads} thread(s)\n")
    titles = [f"{phase:>10}" for phase in PHASES] + [f"{name:>16}" for name in ("targets ratio", "metrics ratio")]
    print(f"{'seconds':14}" + "".join(titles) + f"{'updates differ':>16}")
    one = best["one process"]
    for variant, found in best.items():
        ratios = [one[phase] / found[phase] for phase in ("targets", "metrics")]
        print(f"{variant:14}" + "".join(f"{found[phase]:10.2f}" for phase in PHASES)
              + "".join(f"{ratio:15.2f}x" for ratio in ratios) + f"{differ[variant]:16.1e}")  # fmt: skip
    told = {name: value for name, value in vars(args).items() if name != "json"}
    write_result(args.json, {"seconds": best, "differ": differ, **told})


if __name__ == "__main__":
    main()
