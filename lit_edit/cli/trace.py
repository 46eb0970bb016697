"""``trace``: where in a model the recall of facts passes, by causal tracing."""

from __future__ import annotations

import hashlib
import math
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from lit_edit.console.arguments import make_parser, positive
from lit_edit.errors import ArgumentError, counted
from lit_edit.files.paths import expand

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lit_edit.models import ModelAdapter
    from lit_edit.studies.tracing import FactTrace, KnownFact, TokenizedFact
    from lit_edit.studies.tracing.files import TraceFolder
    from lit_edit.studies.tracing.study import Tracer
    from lit_edit.studies.tracing.summary import AverageEffect

KINDS = ("hidden", "mlp", "attn")


def _parser() -> ArgumentParser:
    parser = make_parser(
        "trace",
        "Causal tracing (Meng et al. 2022): corrupt the subject of a fact with noise, put single clean states back, "
        "and see where that brings the answer back. Only facts that the model knows are traced: its most probable next "
        "token is the attribute's first. A tracing that was cut goes on with the same command, and with a larger "
        "--limit.",
    )
    parser.epilog = (
        "In OUT: facts.jsonl (the finished facts, as they come), effects, average and fraction_restored (.csv, and "
        ".parquet), average.png, facts/*.png. docs/tracing.md explains them."
    )
    parser.add_data(
        "facts as JSON, JSONL or CSV with prompt, subject, attribute (known_1000.json of ROME), or CounterFact; "
        "'known_facts': such a file in the working folder; 'builtin': thirty facts that come with lit-edit",
        default="builtin",
    )
    parser.add_model()
    parser.add_limit("trace so many facts that the model knows", default=50)
    text = "what is restored: one hidden state, MLP outputs or attention outputs over a window of layers"
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help=text)
    parser.add_argument("--samples", type=positive, default=10, help="draws of the noise per fact")
    text = "its standard deviation, in those of the subjects' embeddings"
    parser.add_argument("--noise", type=float, default=3.0, help=text)
    text = "layers restored together (mlp, attn), around the layer named"
    parser.add_argument("--window", type=positive, default=10, help=text)
    parser.add_seed("seed of the noise")
    text = "'fastest' multiplies in bfloat16 where the machine is clearly faster at it; 'exact' in float32"
    parser.add_argument("--precision", choices=["fastest", "exact"], default="fastest", help=text)
    text = "facts traced at a time, by threads that share the cores (default: up to 4 on a CPU, 1 on a GPU)"
    parser.add_argument("--workers", type=positive, default=None, help=text)
    parser.add_out("folder to write to (default: runs/traces/MODEL)")
    parser.add_argument("--no-fact-figures", action="store_true", help="draw the averages only")
    return parser


def run_trace(args: list[str]) -> None:
    """Run ``lit-edit trace``."""
    options = _parser().parse_args(args)
    if options.data not in ("builtin", "known_facts") and not expand(options.data).exists():
        raise ArgumentError(f"--data {options.data}: no such file")

    from lit_edit.models import LanguageModel, ModelAdapter
    from lit_edit.stats.second_moment import weights_hash
    from lit_edit.studies.frame import results_folder
    from lit_edit.studies.tracing import average_effects, read_facts
    from lit_edit.studies.tracing.facts import find_file
    from lit_edit.studies.tracing.files import TraceFolder
    from lit_edit.studies.tracing.study import Tracer, TraceSettings, workers_for

    kinds = tuple(sorted(options.kinds, key=KINDS.index))
    settings = TraceSettings(kinds, options.samples, options.noise, options.window, options.seed)
    file = find_file(options.data)
    facts = read_facts(file)
    with results_folder(options.out, "traces", options.model) as out:
        model, tokenizer = LanguageModel(options.model).load()
        adapter = ModelAdapter(model)
        tokenized = _tokenize(file, facts, tokenizer)
        tracer = Tracer(adapter, tokenizer, tokenized, settings, options.precision == "fastest")
        folder = TraceFolder(out)
        told = {
            **vars(settings),
            "model": options.model,
            "weights": weights_hash(adapter.model),
            "data": hashlib.sha256(file.read_bytes()).hexdigest()[:16],
            "products": "bfloat16" if tracer.rounds else str(adapter.dtype).removeprefix("torch."),
        }
        finished = {trace.id: trace for trace in folder.open(told)}
        chosen = _choose(adapter, tokenizer, tokenized, options.limit)
        traces = _trace(tracer, chosen, finished, folder, options.workers or workers_for(adapter))
        averages = average_effects(traces)
        files = folder.write_tables(traces, averages)
        _draw(out, traces, averages, options)
    _report(traces, averages, out, files)


def _tokenize(file: Path, facts: Sequence[KnownFact], tokenizer: PreTrainedTokenizerBase) -> list[TokenizedFact]:
    from lit_edit.data.request import DataError
    from lit_edit.studies.tracing import tokenize_fact
    from lit_edit.text.tokens import check_tokenizer

    check_tokenizer(tokenizer)
    made = []
    for fact in facts:
        try:
            made.append(tokenize_fact(tokenizer, fact))
        except DataError as error:
            raise DataError(f"{file}: fact {fact.id}: {error}") from None
    return made


def _choose(
    adapter: ModelAdapter, tokenizer: PreTrainedTokenizerBase, facts: Sequence[TokenizedFact], limit: int
) -> list[TokenizedFact]:
    """Return the first facts that the model knows."""
    from tqdm import tqdm

    from lit_edit.studies.tracing.prompts import known_facts

    with tqdm(total=len(facts), desc="which facts are known", unit="fact", leave=False) as bar:
        tried = known_facts(adapter, tokenizer, facts, progress=lambda count: bar.update(count - bar.n))
        chosen = list(islice(tried, limit))
    if not chosen:
        raise ArgumentError(
            f"the model knows none of the {len(facts)} facts (its first choice is never the attribute's first token): "
            "there is nothing to trace; use other facts (--data) or another --model"
        )
    if len(chosen) < limit:
        sys.stderr.write(f"the model knows {len(chosen)} of the {len(facts)} facts; --limit {limit} asked for more\n")
    return chosen


def _trace(
    tracer: Tracer, chosen: Sequence[TokenizedFact], finished: dict[str, FactTrace], folder: TraceFolder, workers: int
) -> list[FactTrace]:
    from tqdm import tqdm

    done = sum(fact.fact.id in finished for fact in chosen)
    with tqdm(total=len(chosen), initial=done, desc="tracing", unit="fact") as bar:

        def keep(trace: FactTrace) -> None:
            folder.append(vars(trace))
            bar.update()

        return list(tracer.trace_all(chosen, finished, keep, workers))


def _draw(out: Path, traces: Sequence[FactTrace], averages: Sequence[AverageEffect], options: Namespace) -> None:
    from tqdm import tqdm

    from lit_edit.files.pictures import write_figure
    from lit_edit.studies.tracing.figures import draw_averages, draw_fact

    title = f"{options.model}, {counted(len(traces), 'fact')}, {options.samples} samples, noise of {options.noise:g} sd"
    write_figure(out / "average.png", draw_averages(averages, options.window, title))
    shown = [] if options.no_fact_figures else traces
    for number, trace in enumerate(tqdm(shown, "figures", unit="fact", leave=False, disable=not shown)):
        name = re.sub(r"[^\w-]+", "-", trace.prompt).strip("-")[:60]
        path = out / "facts" / f"{number:03d}-{name}.png"
        if not path.exists():
            write_figure(path, draw_fact(trace, options.window))


def _report(traces: Sequence[FactTrace], averages: Sequence[AverageEffect], out: Path, files: Sequence[str]) -> None:
    from rich.box import SIMPLE

    from lit_edit.console.tables import print_whole, table_of
    from lit_edit.studies.tracing.prompts import ROLES
    from lit_edit.studies.tracing.summary import total_effect

    effect, error = total_effect(traces)
    sys.stdout.write(f"{counted(len(traces), 'fact')}; average total effect {_with_error(effect, error)}\n")
    kinds, rows = list(traces[0].restored), []
    for role in ROLES:
        cells = []
        for kind in kinds:
            found = [a for a in averages if (a.kind, a.role) == (kind, role)]
            best = max(found, key=lambda a: a.effect, default=None)
            cells.append("" if best is None else f"{_with_error(best.effect, best.error)} ({best.layer})")
        rows.append((role, *cells))
    title = "Highest average indirect effect (at layer)"
    print_whole(table_of(("token", *kinds), rows, whole=True, title=title, box=SIMPLE))
    facts = ", facts/" if (out / "facts").is_dir() else ""
    sys.stdout.write(f"Everything is in {out}/ (facts.jsonl, {', '.join(files)}, average.png{facts})\n")


def _with_error(value: float, error: float) -> str:
    return f"{value:.3f}" if math.isnan(error) else f"{value:.3f} ± {error:.3f}"
