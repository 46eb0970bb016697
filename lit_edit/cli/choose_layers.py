"""``choose-layers``: which layers a method should edit on a model that nobody has tuned."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_edit.console.arguments import make_parser, positive
from lit_edit.errors import counted
from lit_edit.studies.layers import BASE

if TYPE_CHECKING:
    from tqdm import tqdm

    from lit_edit.data.request import EditRequest
    from lit_edit.studies.layers.bench import Bench
    from lit_edit.studies.layers.method import Method
    from lit_edit.studies.layers.search import Found, Plan
    from lit_edit.studies.layers.trial import Trial


def _options(args: list[str]) -> argparse.Namespace:
    parser = make_parser(
        "choose-layers",
        "Find the layers that a method should edit on a model: single layers on a grid that gets finer around the "
        "best, then groups of layers around these. Each candidate makes the same edits from the original weights and "
        "is measured by what they do (efficacy, generalization, locality). The best and the default layers are "
        "compared on edits that the search has not seen, and the better are proposed. A search that was cut goes on "
        "with the same command.",
    )
    parser.epilog = (
        "In OUT: results.jsonl (the trials, as they come), layers.png, and proposal.yaml for lit-edit fit --config "
        f"{BASE} --config OUT/proposal.yaml. docs/choose_layers.md explains them."
    )
    parser.add_model()
    parser.add_data(
        "edits with target_true, paraphrases and neighborhood, CounterFact for one; 'builtin': facts that come "
        "with lit-edit",
        default="builtin",
    )
    parser.add_method("method/d4s")
    parser.add_limit("edits to choose by", "--edits", default=12)
    parser.add_argument("--held-out", type=positive, default=12, help="edits to compare choice and default on")
    text = "layers in a group (default: 1 3 5 as far as there are)"
    parser.add_argument("--widths", type=positive, nargs="+", default=None, help=text)
    text = "distance of the first grid's layers; auto: an eighth of the depth"
    parser.add_argument("--stride", type=_stride, default=None, help=text)
    parser.add_seed("of the draw of the edits, and of the method")
    parser.add_out("folder to write to (default: runs/layers/MODEL)")
    return parser.parse_args(args)


def _stride(text: str) -> int | None:
    return None if text == "auto" else positive(text)


def run_choose_layers(args: list[str]) -> None:
    """Run ``lit-edit choose-layers``."""
    options = _options(args)

    from lit_edit.data.sources import load_requests
    from lit_edit.studies.frame import results_folder
    from lit_edit.studies.layers.method import Method
    from lit_edit.studies.layers.sample import draw_samples

    source = {"source": "builtin"} if options.data == "builtin" else {"source": "file", "path": options.data}
    requests, _ = load_requests(**source)
    samples = draw_samples(requests, options.limit, options.held_out, options.seed)
    method = Method(options.method, options.model, options.seed)
    with results_folder(options.out, "layers", options.model) as out:
        found = _search(options, out, method, *samples)
    _report(*found, out)


def _search(
    options: argparse.Namespace, out: Path, method: Method, sample: list[EditRequest], held_out: list[EditRequest]
) -> tuple[Found, Plan, list[Trial]]:
    from dataclasses import asdict, replace
    from functools import partial

    from tqdm import tqdm

    from lit_edit.data.datamodule import perplexity_texts
    from lit_edit.files.paths import write_text
    from lit_edit.files.pictures import write_figure
    from lit_edit.models import ModelAdapter
    from lit_edit.runs.results import ResultsFolder
    from lit_edit.studies.layers.bench import Bench
    from lit_edit.studies.layers.candidates import automatic_stride, check_widths
    from lit_edit.studies.layers.figures import draw_search
    from lit_edit.studies.layers.key_statistics import StatisticsOfAll
    from lit_edit.studies.layers.proposal import proposal_text
    from lit_edit.studies.layers.search import Plan, search_layers
    from lit_edit.studies.layers.trial import Trial

    model, tokenizer = method.stream.language_model.load()
    adapter = ModelAdapter(model)
    widths = check_widths(options.widths, adapter.n_layers)
    stride = automatic_stride(adapter.n_layers) if options.stride is None else options.stride
    statistics = StatisticsOfAll.like(method.stream.statistics, adapter.editable)
    with tqdm(desc="layers", unit="candidate", bar_format=_BAR) as bar:
        bench = Bench(
            adapter,
            tokenizer,
            method.make,
            statistics,
            perplexity_texts(),
            method.window,
            method.stream.on_conflict,
            partial(_show_tokens, bar),
        )
        groups, default = widths if bench.takes_groups() else (1,), bench.default_layers()
        plan = Plan(adapter.n_layers, stride, groups, options.limit, options.held_out, default)
        folder = ResultsFolder(out, Trial.from_dict)
        kept = {trial.key: trial for trial in folder.open(_settings(options, method, bench, plan, sample + held_out))}

        def measure(stage: Any, layers: tuple[int, ...], edits: int) -> Trial:
            """Try a candidate, unless its trial is on record."""
            key = Trial(stage, layers, edits).key
            if key not in kept:
                requests = held_out if stage == "held out" else sample
                kept[key] = bench.measure(stage, layers, requests[:edits])
                folder.append(asdict(kept[key]))
            return replace(kept[key], stage=stage)

        found = search_layers(plan, measure, partial(_show, bar))
    trials = list(kept.values())
    write_figure(out / "layers.png", draw_search(trials, plan.default, f"{options.model}, {options.method}"))
    how = [
        f"Layers of {options.model} for {options.method}, proposed by lit-edit choose-layers: {len(trials)} trials, "
        f"{counted(options.limit, 'edit')} to choose by, {options.held_out} held out, seed {options.seed}.",
        f"  lit-edit fit --config {BASE} --config {out / 'proposal.yaml'} --data.path FILE",
    ]
    write_text(out / "proposal.yaml", proposal_text(found, options.model, method.editor, how, method.content()))
    return found, plan, trials


_BAR = "{desc}: {n_fmt}/{total_fmt} [{elapsed}]{postfix}"


def _show(bar: tqdm[Any], what: str, number: int, of: int) -> None:
    bar.total, bar.n = of, number
    bar.set_description_str(what)


def _show_tokens(bar: tqdm[Any], done: int, total: int) -> None:
    bar.set_postfix_str(f"key statistics of all layers: {done} of {total} tokens" if done < total else "")


def _settings(
    options: argparse.Namespace, method: Method, bench: Bench, plan: Plan, requests: Sequence[EditRequest]
) -> dict[str, Any]:
    """Return all that decides about the numbers, as JSON can hold it."""
    import json

    data = json.dumps([request.as_dict() for request in requests], sort_keys=True)
    return {
        "model": options.model,
        "weights": bench.base_hash,
        "sample": hashlib.sha256(data.encode()).hexdigest()[:16],
        "seed": options.seed,
        **{name: value for name, value in vars(plan).items() if name != "depth"},
        **method.settings(),
    }


def _report(found: Found, plan: Plan, trials: Sequence[Trial], out: Path) -> None:
    from rich.box import SIMPLE

    from lit_edit.console.tables import print_whole, table_of
    from lit_edit.studies.layers.figures import thorough
    from lit_edit.studies.layers.proposal import COLUMNS, as_cell, verdict

    searched = thorough([trial for trial in trials if trial.stage != "held out"])
    searched.sort(key=lambda trial: (trial.edits, trial.rank), reverse=True)
    both = list(dict.fromkeys([found.best_held_out, found.default_held_out]))
    rows = []
    for number, trial in enumerate([*searched, *both]):
        apart = number >= len(searched)
        marks = ["held out"] if apart else []
        marks += ["default"] if trial.layers == plan.default else []
        marks += ["proposed"] if apart and trial.layers == found.proposed.layers else []
        marks += ["cannot be edited"] if trial.error else ["breaks the model"] if trial.broken else []
        cells = (as_cell(trial, name) for name in COLUMNS)
        rows.append((trial.name, trial.edits, *cells, trial.refused or "", ", ".join(marks)))
    headings = ("layers", "edits", *COLUMNS, "refused", "")
    title = "Layers, best first (each over most edits)"
    table = table_of(headings, rows, whole=True, title=title, box=SIMPLE)
    table.rows[len(searched) - 1].end_section = True
    print_whole(table)
    sys.stdout.write(f"{verdict(found)}\n")
    sys.stdout.write(f"Everything is in {out}/ (results.jsonl, layers.png, proposal.yaml); use it with\n")
    sys.stdout.write(f"  lit-edit fit --config {BASE} --config {out / 'proposal.yaml'} --data.path FILE\n")
