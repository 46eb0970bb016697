"""The front of efficacy against locality: one stream under several settings, everything measured at its end.

    python benchmarks/tune.py --data counterfact.json --limit 100 --perplexity me_ppl_50.json --json front.json
    python benchmarks/tune.py --limit 20 --set covariance_weight=100 covariance_weight=500   # the built-in facts

Each --set is one run: comma-separated settings of the D4S editor (covariance_weight, residual, layers=6-10,
context_count) and of its target optimisation (steps, lr, probability, kl_factor, clamp, weight_decay, rule, trust,
precision, margin, plain_first). --skip leaves the first edits out. Targets are shared between runs that agree in them.
Prints a row per run; --json writes them.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import fields, replace
from time import perf_counter
from typing import Any

from common import add_model, load_model, make_parser, read_data, write_result

from lit_edit import D4S, KeyStatistics, TargetSettings
from lit_edit.editors.closed_form.located import DEFAULT_TARGET
from lit_edit.ledger.edit_ledger import EditLedger
from lit_edit.metrics.evaluation import evaluate_edits, measure_perplexity, summarise

TARGET = {field.name: field.type for field in fields(TargetSettings)}


def parse_setting(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    editor: dict[str, Any] = {}
    target: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name == "layers":
            low, _, high = value.partition("-")
            editor[name] = list(range(int(low), int(high or low) + 1))
        elif name in TARGET:
            target[name] = _value(value)
        else:
            editor[name] = _value(value)
    return editor, target


def _value(text: str) -> int | float | bool | str:
    """Read a setting's value: a number, true or false, or a word."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return {"true": True, "false": False}.get(text, text)


def main() -> None:
    parser = make_parser(__doc__)
    add_model(parser)
    parser.add_argument("--data", default=None)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--skip", type=int, default=0, help="leave out so many edits at the beginning")
    parser.add_argument("--perplexity", default=None)
    parser.add_argument("--corpus", default="sampled")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--window", type=int, default=20)
    parser.add_argument("--set", nargs="+", default=[""], help="one run each; the empty string is the default")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    data = read_data(options.data, options.skip + options.limit, perplexity_path=options.perplexity)
    requests = data.requests[options.skip :]
    adapter, tokenizer = load_model(options.model)
    statistics = KeyStatistics(options.corpus, options.tokens)
    before = {r.id: r for r in evaluate_edits(adapter, tokenizer, requests)}
    base = measure_perplexity(adapter, tokenizer, data.perplexity_texts)["mean"]
    shared: dict[Any, Any] = {}
    rows = []
    print(f"{'settings':44s}  acc   suc   par   loc   agree  ppl      |W|    p     steps  s/edit", flush=True)
    for text in options.set:
        arguments, target = parse_setting(text)
        editor = D4S(**arguments, target=replace(DEFAULT_TARGET, **target))
        ledger = EditLedger(adapter, editor.resolve_layers(adapter))
        editor.prepare(ledger, tokenizer, statistics)
        start = perf_counter()
        key = (ledger.layers[-1], editor.target, editor.templates)
        for first in range(0, len(requests), options.window):
            window = requests[first : first + options.window]
            for request in window:
                # One editor's targets serve the next with the same settings: they depend on the base model alone.
                editor.targets |= {name: pair for (k, name), pair in shared.items() if k == key}
                proposal = editor.propose([request], window)
                shared |= {(key, name): pair for name, pair in editor.targets.items()}
                ledger.commit(proposal.updates, proposal.entries)
                editor.accept(proposal)
        seconds = (perf_counter() - start) / len(requests)
        final = summarise(evaluate_edits(adapter, tokenizer, requests), before)
        perplexity = measure_perplexity(adapter, tokenizer, data.perplexity_texts)["mean"]
        norms = ledger.layer_norms().values()
        growth = max(n["mean_abs_after"] / n["mean_abs_before"] - 1 for n in norms)
        facts = [entry.facts for entry in ledger.entries]
        row = {
            "settings": text or "default",
            "accuracy": final["efficacy"]["accuracy"],
            "success": final["efficacy"]["success"],
            "paraphrase_success": final["generalization"]["success"],
            "locality_success": final["locality"]["success"],
            "agreement": final["locality"]["agreement"],
            "perplexity_change": perplexity / base - 1,
            "norm_growth": growth,
            "target_probability": sum(f["target_probability"] for f in facts) / len(facts),
            "target_steps": sum(f["target_steps"] for f in facts) / len(facts),
            "seconds_per_edit": seconds,
        }
        rows.append(row)
        values = [row[name] for name in list(row)[1:]]
        layout = "{:5.2f} {:5.2f} {:5.2f} {:5.2f} {:6.3f}  {:+6.1%}  {:+6.1%}  {:5.2f} {:6.1f} {:7.2f}"
        print(f"{row['settings'][:44]:44s} " + layout.format(*(v if v is not None else float("nan") for v in values)))
        write_result(options.json, rows)
        ledger.restore_base()


if __name__ == "__main__":
    main()
