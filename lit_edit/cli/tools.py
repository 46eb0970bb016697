"""``ask``, ``stats`` and ``models``; ``export`` and ``apply`` have a module of their own."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from lit_edit.cli.ability import run_ability
from lit_edit.cli.choose_layers import run_choose_layers
from lit_edit.cli.eval_harness import run_eval_harness
from lit_edit.cli.export import run_apply, run_export
from lit_edit.cli.history import run_log, run_redo, run_undo
from lit_edit.cli.mine_hard import run_mine_hard
from lit_edit.cli.plan import run_plan
from lit_edit.cli.report import run_report
from lit_edit.cli.trace import run_trace
from lit_edit.console.arguments import make_parser, positive


def run_tool(command: str, args: list[str]) -> None:
    """Run one of the tools; each parses its own arguments before anything heavy is imported."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("lit_edit").setLevel(logging.INFO)
    tools = {
        "ask": _ask,
        "export": run_export,
        "apply": run_apply,
        "log": run_log,
        "undo": run_undo,
        "redo": run_redo,
        "report": run_report,
        "plan": run_plan,
        "trace": run_trace,
        "stats": _stats,
        "models": _models,
        "ability": run_ability,
        "eval-harness": run_eval_harness,
        "mine-hard": run_mine_hard,
        "choose-layers": run_choose_layers,
    }
    tools[command](args)


def _ask(args: list[str]) -> None:
    parser = make_parser("ask", "Show how the base model and the edited model of a run continue a prompt.")
    parser.add_argument("prompt", nargs="+", type=_prompt, help="one or more prompts, each in quotes")
    parser.add_argument("--run", required=True, type=Path, help="the run folder, for example runs/x")
    parser.add_argument("--tokens", type=positive, default=20, help="length of the continuation")
    options = parser.parse_args(args)

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from lit_edit.models.generation import continue_greedily
    from lit_edit.runs.folder import open_run

    run = open_run(options.run)
    before = [continue_greedily(run.ledger.adapter, run.tokenizer, p, options.tokens) for p in options.prompt]
    run.apply()
    after = [continue_greedily(run.ledger.adapter, run.tokenizer, p, options.tokens) for p in options.prompt]
    table = Table(show_lines=True)
    for column in ("prompt", "base model", f"after {len(run.entries)} edits"):
        table.add_column(column)
    for prompt, base, edited in zip(options.prompt, before, after, strict=True):
        table.add_row(escape(prompt), escape(base), escape(edited))
    Console().print(table)


def _stats(args: list[str]) -> None:
    parser = make_parser(
        "stats", "Compute the second moments of the keys ahead of a run; they are kept and found again."
    )
    parser.add_argument("--model", default="smollm2-135m", help="packaged model, folder or hub id")
    parser.add_argument("--layers", type=int, nargs="+", default=None, help="layers; by default the model's preset")
    parser.add_argument("--corpus", default="sampled", help="'sampled', a text file, or a hub data set id")
    parser.add_argument(
        "--tokens", type=int, default=20_000, help="tokens to read; never fewer than ten per key dimension"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of sampled text")
    parser.add_argument("--force", action="store_true", help="compute anew even if kept")
    options = parser.parse_args(args)

    from time import perf_counter

    from tqdm import tqdm

    from lit_edit.errors import ArgumentError
    from lit_edit.models import LanguageModel, ModelAdapter
    from lit_edit.models.presets import edit_layers
    from lit_edit.stats.second_moment import KeyStatistics

    try:
        statistics = KeyStatistics(options.corpus, options.tokens, options.seed, force=options.force)
    except ValueError as error:
        raise ArgumentError(str(error)) from error
    model, tokenizer = LanguageModel(options.model).load()
    adapter = ModelAdapter(model)
    layers = sorted(set(options.layers)) if options.layers else list(edit_layers(adapter))
    for layer in layers:
        adapter.check_layer(layer)
    kept = statistics.is_cached(adapter, layers)
    start = perf_counter()
    with tqdm(desc="key statistics", unit="token", disable=kept) as bar:

        def show(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        moments = statistics.compute(adapter, tokenizer, layers, show)
    spent = perf_counter() - start
    what = "found in the cache" if kept else f"computed in {spent:.0f} s"
    sys.stdout.write(f"Key statistics of {options.model}, layers {', '.join(map(str, layers))}: {what}\n")
    for layer, moment in moments.items():
        eigenvalues = moment.diagonal()
        sys.stdout.write(
            f"  layer {layer}: {len(moment)} dimensions, mean square {eigenvalues.mean():.4g}, "
            f"largest {eigenvalues.max():.4g}\n"
        )


def _models(args: list[str]) -> None:
    make_parser("models", "List known models, what is cached, and the configs that ship.").parse_args(args)

    from rich.console import Console
    from rich.table import Table

    from lit_edit.console.configs import shipped_configs
    from lit_edit.files.paths import cache_dir
    from lit_edit.models.families import SPECS
    from lit_edit.models.packaged import ENCODERS, PACKAGED
    from lit_edit.models.presets import PUBLISHED

    console = Console()
    table = Table(title="Packaged models", title_justify="left")
    for column in ("name", "what", "licence", "cached"):
        table.add_column(column)
    for model in (*PACKAGED.values(), *ENCODERS.values()):
        table.add_row(model.name, model.title, model.licence, "yes" if model.is_cached else f"no ({model.size})")
    console.print(table)
    families: dict[str, list[Any]] = {}
    for (kind, depth, width), layers in PUBLISHED.items():
        families.setdefault(kind, []).append(f"{depth} layers of {width}: {layers[0]}–{layers[-1]}")
    table = Table(title="Architectures (any hub id or folder of these)", title_justify="left")
    table.add_column("family")
    table.add_column("sizes with published edit layers")
    for spec in SPECS:
        table.add_row(spec.family, "; ".join(families.get(spec.family, [])))
    console.print(table)
    console.print(f"cache: {cache_dir()}", highlight=False)
    published = [name.split("/")[1:] for name in shipped_configs() if name.startswith("published/")]
    rest = [name for name in shipped_configs() if not name.startswith("published/")]
    console.print(f"configs: {', '.join(rest)}", highlight=False)
    for place in dict.fromkeys(place for place, _ in published):
        methods = ", ".join(method for at, method in published if at == place)
        console.print(f"published/{place}/: {methods}", highlight=False)


def _prompt(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("a prompt must not be empty")
    return text
