"""How near an exact edit is to what the machine can do at all.

    python benchmarks/limit.py --data counterfact.json --json limit.json
    python benchmarks/limit.py --edits 16          # the built-in facts

Counts the floating-point operations of matrix products that an exact D4S edit cannot avoid: the unchanged model once
over the distinct tokens, then for each step the layers above the edited one, forward and backward, at the tokens from
the lookup token on, and the head at target positions; the edited layers once more for the keys; the solve. Divided by
the machine's rate of large float32 matrix products of the model's own shape, measured in between with the fastest exact
kernel, that is the time an edit takes at least. Norms, attention scores, softmax, Python
and all else are not counted: the engine cannot reach 100 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from time import perf_counter

import torch
from common import add_model, load_model, make_edits, make_parser, read_data, write_result

from lit_edit import D4S, KeyStatistics
from lit_edit.ledger.edit_ledger import EditLedger
from lit_edit.models import ModelAdapter
from lit_edit.targets.problem import TargetProblem, build_problem


class MatmulRate:
    """Times float32 products with a layer's own weight shape, a few at a time while the engine works.

    A virtual machine gives more in one second than in the next: products timed before or after the work would be
    measured on another machine than it.
    """

    def __init__(self, adapter: ModelAdapter, layer: int, tokens: int = 768) -> None:
        d_out, d_in = adapter.shape(layer)
        self.adapter, self.operations = adapter, 2 * tokens * d_in * d_out
        self.keys, self.weight = torch.randn(tokens, d_in), torch.randn(d_out, d_in)
        self.spent: list[float] = []
        self.total = 0.0  # seconds taken by the measurement itself

    def __call__(self, message: str = "") -> None:
        begin = perf_counter()
        with self.adapter.fast_products():
            for number in range(6):
                start = perf_counter()
                torch.nn.functional.linear(self.keys, self.weight)
                if number > 0:  # the first one finds its operands out of the cache
                    self.spent.append(perf_counter() - start)
        self.total += perf_counter() - begin

    def sustained(self) -> float:
        """Return operations per second at the median: the rate that work of some seconds can have."""
        return self.operations / median(self.spent)

    def best(self) -> float:
        """Return operations per second of the fastest product."""
        return self.operations / min(self.spent)


def layer_operations(adapter: ModelAdapter, layer: int) -> int:
    """Return the operations of a layer's linear maps for one token."""
    return sum(2 * p.numel() for p in adapter.layers[layer].parameters() if p.dim() == 2)


def edit_operations(
    adapter: ModelAdapter, layers: Sequence[int], problems: Sequence[TargetProblem], steps: Sequence[int]
) -> dict[str, float]:
    """Return the operations that some edits cannot do without, by phase."""
    per_layer = [layer_operations(adapter, n) for n in range(adapter.n_layers)]
    head = 2 * adapter.head.weight.numel()
    first, last = layers[0], layers[-1]
    below, above, edited = sum(per_layer[: last + 1]), sum(per_layer[last + 1 :]), sum(per_layer[first : last + 1])
    shared: set[tuple[int, ...]] = set()  # distinct beginnings, up to the lookup tokens
    own = 0
    fitting = keys = 0.0
    for problem, count in zip(problems, steps, strict=True):
        rows = [(p.ids + problem.target[:-1], p.lookup) for p in problem.prompts]
        rows.append((problem.essence.ids, problem.essence.lookup))
        moved = sum(len(ids) - lookup for ids, lookup in rows)
        own += moved
        shared |= {tuple(ids[: i + 1]) for ids, lookup in rows for i in range(lookup)}
        read = len(problem.prompts) * len(problem.target) + 1
        # Forward at each step, backward at each but the last.
        fitting += (moved * above + read * head) * (2 * count - 1)
        tokens = {tuple(p.ids[: i + 1]) for p in problem.prompts for i in range(p.lookup + 1)}
        keys += len(tokens) * edited
    base = (len(shared) + own) * below + len(shared) * above
    d_out, d_in = adapter.shape(last)
    solve = len(problems) * len(layers) * 2.0 * (d_in * d_in + 2 * d_in * d_out)
    return {"targets": fitting + base, "keys": keys, "solve": solve}


def main() -> None:
    parser = make_parser(__doc__, edits=32)
    add_model(parser)
    parser.add_argument("--window", type=int, default=32)
    options = parser.parse_args()

    requests = read_data(options.data, options.edits).requests
    adapter, tokenizer = load_model(options.model)
    editor = D4S()
    ledger = EditLedger(adapter, editor.resolve_layers(adapter))
    editor.prepare(ledger, tokenizer, KeyStatistics(tokens=options.tokens))

    rates = MatmulRate(adapter, ledger.layers[-1])
    seconds: dict[str, float] = {}
    aside = 0.0  # the measurement's own, all of it between the steps of the targets
    for spent in make_edits(editor, ledger, requests, options.window, rates):
        spent["targets"] -= rates.total - aside
        aside = rates.total
        for phase, value in spent.items():
            seconds[phase] = seconds.get(phase, 0.0) + value
    rate, best = rates.sustained(), rates.best()

    problems = [build_problem(tokenizer, request, editor.templates) for request in requests]
    steps = [int(entry.facts["target_steps"]) for entry in ledger.entries]
    operations = edit_operations(adapter, ledger.layers, problems, steps)
    mean = sum(steps) / len(steps)
    print(
        f"{len(requests)} edits, {mean:.1f} steps each; matrix products at {rate / 1e9:.0f} GFLOP/s sustained, "
        f"{best / 1e9:.0f} at best\n"
    )
    print(f"{'per edit':10s}{'GFLOP':>9s}{'least s':>10s}{'engine s':>10s}{'reached':>9s}")
    rows = {}
    for phase in ("targets", "keys", "solve", "all"):
        work = sum(operations.values()) if phase == "all" else operations[phase]
        spent = sum(seconds.values()) if phase == "all" else seconds[phase]
        least = work / rate
        rows[phase] = {
            "gflop": work / len(requests) / 1e9,
            "least_seconds": least / len(requests),
            "engine_seconds": spent / len(requests),
            "fraction": least / spent,
        }
        print(
            f"{phase:10s}"
            + "{gflop:9.1f}{least_seconds:10.3f}{engine_seconds:10.3f}{fraction:9.0%}".format(**rows[phase])
        )
    print(f"of the limit at the best rate: {rows['all']['fraction'] * rate / best:.0%}")
    result = {
        "gflops_per_second": rate / 1e9,
        "best_gflops_per_second": best / 1e9,
        "fraction_of_limit": rows["all"]["fraction"],
        "fraction_of_limit_at_best_rate": rows["all"]["fraction"] * rate / best,
        "phases": rows,
    }
    write_result(options.json, result)


if __name__ == "__main__":
    main()
