"""A long stream that is killed again and again: does it come to the same end, in flat memory?

    python benchmarks/soak.py --data counterfact.json --edits 2000 --kills 20
    python benchmarks/soak.py --data counterfact.json --edits 60 --kills 20 --compare   # and once without being killed

Starts ``lit-edit fit ... --resume auto`` in a process of its own, kills it with SIGKILL at random instants, and starts
the very same command again, until the run has come to its end. Then it replays the journal from the first record,
without any checkpoint, and compares the weights bit for bit with those the run has left. With ``--compare`` the stream
is run once more without kills, and everything is compared: weights, solver state, summary, metrics, wandb's history.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

RECORD = 92_000  # bytes of an edit in the journal, about; only to spread the kills over the run


def command(options: argparse.Namespace, name: str) -> list[str]:
    """The command that is given again and again."""
    words = [sys.executable, "-m", "lit_edit", "fit", "--config", "counterfact", "--config", options.method]
    words += ["--config", str(Path(__file__).with_suffix(".yaml")), "--data.path", options.data]
    words += ["--data.limit", str(options.edits), "--runs_dir", options.runs, "--run_name", name]
    words += ["--resume", "auto", "--trainer.enable_progress_bar", "false"]
    if options.compare:
        words += ["--trainer.logger", "wandb"]
    return [*words, *options.more]


def resident(pid: int) -> float:
    """Resident memory of a process in MB."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith("VmRSS")), 0.0)


def journal_bytes(folder: Path) -> int:
    try:
        return (folder / "ledger" / "journal").stat().st_size
    except OSError:
        return 0


def run(options: argparse.Namespace, name: str, kills: int) -> dict[str, Any]:
    """Run the stream to its end, killing it on the way."""
    folder, rng = Path(options.runs) / name, random.Random(options.seed)
    marks = sorted(rng.uniform(0, options.edits * RECORD) for _ in range(kills))
    samples: list[tuple[float, int, float]] = []
    killed: list[int] = []
    start, log = time.time(), open(Path(options.runs) / f"{name}.log", "w")  # noqa: SIM115 - for the whole run
    while True:
        process = subprocess.Popen(command(options, name), stdout=log, stderr=subprocess.STDOUT)
        began, early = time.time(), rng.uniform(1, 12)
        while process.poll() is None:
            time.sleep(0.05)
            size = journal_bytes(folder)
            if not samples or time.time() - start - samples[-1][0] > 2:
                samples.append((time.time() - start, size, resident(process.pid)))
            # Every fourth kill comes while the process still starts, the others at a place in the stream.
            due = bool(marks) and (size >= marks[0] if len(marks) % 4 else time.time() - began > early)
            if due:
                time.sleep(rng.uniform(0, 0.5))
                marks.pop(0)
                process.send_signal(signal.SIGKILL)
                process.wait()
                killed.append(size)
                print(f"  killed at {size / RECORD:.0f} edits or so, {time.time() - start:.0f} s", flush=True)
        if process.returncode == 0 and not marks:
            break
        if process.returncode == 0:  # over before all kills were made
            print(f"  ended with {len(marks)} kills left")
            break
        if process.returncode != -signal.SIGKILL:
            raise SystemExit(f"the run failed by itself ({process.returncode}); see {options.runs}/{name}.log")
    log.close()
    return {"seconds": time.time() - start, "killed": killed, "memory": samples}


def check_journal(folder: Path) -> dict[str, Any]:
    """Replay the journal without a checkpoint and compare with what the run has left."""
    from safetensors.torch import load_file

    from lit_edit.runs.folder import open_for_change, read_history

    history = read_history(folder)
    aside = folder / "checkpoints-aside"
    (folder / "checkpoints").rename(aside)
    try:
        start = time.time()
        with open_for_change(folder) as opened:
            left = load_file(folder / "ledger" / "deltas.safetensors")
            ledger = opened.stream.ledger
            equal = all(torch.equal(left[name], delta.cpu()) for name, delta in ledger.deltas.items())
            drift = max(solver.drift() for solver in opened.stream.editor.solvers.values())
            for layer in ledger.layers:
                held = ledger.edited_weight(layer, ledger.deltas[ledger.names[layer]])
                equal &= torch.equal(ledger.adapter.own_weight(layer), held)
    finally:
        aside.rename(folder / "checkpoints")
    return {
        "made": len(history.made),
        "hold": len(history.live),
        "replaced": len(history.undone),
        "refused": len(history.refused),
        "replay equals the run bit for bit": equal,
        "replay seconds": time.time() - start,
        "drift of P": drift,
        "journal MB": journal_bytes(folder) / 1e6,
    }


def compare(one: Path, other: Path) -> dict[str, bool]:
    """Compare two runs of one command."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from safetensors.torch import load_file

    from lit_edit.files.trees import load_tree
    from tests.loggers.wandb_files import read_run

    def rows(folder: Path) -> list[list[str]]:
        lines = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
        kept = [i for i, name in enumerate(lines[0]) if not name.startswith("time/")]
        return [[line[i] for i in kept] for line in lines]

    def summary(folder: Path) -> dict[str, Any]:
        return {k: v for k, v in json.loads((folder / "summary.json").read_text()).items() if k != "seconds"}

    def history(folder: Path) -> list[dict[str, Any]]:
        return [
            {k: v for k, v in row.items() if not k.startswith(("time/", "_", "figures", "edits"))}
            for row in read_run(folder)["history"]
        ]

    def solvers(folder: Path) -> dict[str, Any]:
        state = load_tree((folder / "checkpoints" / "last.ckpt").resolve())["lit_edit"]["editor"]["solvers"]
        return {f"{layer}.{name}": value for layer, solver in state.items() for name, value in solver.items()}

    left, right = (load_file(folder / "ledger" / "deltas.safetensors") for folder in (one, other))
    states = [solvers(folder) for folder in (one, other)]
    same = all(
        torch.equal(value, states[1][name]) if isinstance(value, torch.Tensor) else value == states[1][name]
        for name, value in states[0].items()
    )
    return {
        "weights": left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left),
        "solver state": same and states[0].keys() == states[1].keys(),
        "summary.json": summary(one) == summary(other),
        "metrics.csv": rows(one) == rows(other),
        "edits.jsonl": (one / "ledger" / "edits.jsonl").read_text() == (other / "ledger" / "edits.jsonl").read_text(),
        "wandb history": history(one) == history(other),
        "wandb steps": len(history(one)) == len(history(other)),
    }


def draw(folder: Path, told: dict[str, Any]) -> Path:
    """Draw memory and growth over the run."""
    import csv

    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    memory = [sample for sample in told["run"]["memory"] if sample[2] > 600]
    left.plot([size / RECORD for _, size, _ in memory], [mb for _, _, mb in memory], ".", markersize=2)
    left.set(xlabel="edits (about)", ylabel="MB", title="Resident memory", ylim=(0, None))
    for size in told["run"]["killed"]:
        left.axvline(size / RECORD, color="tab:red", alpha=0.3, linewidth=0.8)
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in [n for n in rows[0] if n.startswith("norm/") and n.endswith("/mean_abs_w")]:
        points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        first = points[0][1]
        label = name.split("/")[1].removesuffix(".mlp.down_proj.weight")
        right.plot([s for s, _ in points], [100 * (v / first - 1) for _, v in points], label=label)
    right.set(xlabel="edits", ylabel="%", title="Growth of mean |W|")
    right.legend(fontsize=7)
    path = folder / "soak.png"
    figure.savefig(path, dpi=110)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CounterFact, original or flat")
    parser.add_argument("--edits", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--method", default="method/d4s_turbo")
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", action="store_true", help="run the stream without kills too and compare")
    parser.add_argument("more", nargs="*", help="further options of lit-edit fit, behind --")
    options = parser.parse_args()
    Path(options.runs).mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_MODE", "offline")
    for name in ("soak", "soak-whole"):
        shutil.rmtree(Path(options.runs) / name, ignore_errors=True)
    folder = Path(options.runs) / "soak"
    told: dict[str, Any] = {"run": run(options, "soak", options.kills)}
    told["journal"] = check_journal(folder)
    if options.compare:
        run(options, "soak-whole", 0)
        told["equal"] = compare(folder, Path(options.runs) / "soak-whole")
    (folder / "soak.json").write_text(json.dumps(told, indent=1))
    memory = [mb for _, _, mb in told["run"]["memory"] if mb > 600]
    print(f"{told['run']['seconds']:.0f} s, {len(told['run']['killed'])} kills")
    if memory:
        print(f"memory: median {sorted(memory)[len(memory) // 2]:.0f} MB, at most {max(memory):.0f} MB")
    for part in ("journal", "equal"):
        for name, value in told.get(part, {}).items():
            print(f"  {name}: {value}")
    print(f"figure: {draw(folder, told)}")


if __name__ == "__main__":
    main()
