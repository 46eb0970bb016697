"""``mine-hard``: find the single edits that break a model under an editor, and write them as a data set."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_edit.console.arguments import make_parser, positive
from lit_edit.errors import ArgumentError
from lit_edit.studies.frame import check_files, results_folder

if TYPE_CHECKING:
    from lit_edit.data.request import EditRequest
    from lit_edit.studies.hard_facts.mining import Miner, SingleEdit

SHOWN = 20
"""Lines of the table."""


def run_mine_hard(args: list[str]) -> None:
    """Run ``lit-edit mine-hard``."""
    options, rest = _parser().parse_known_args(args)
    if options.factor <= 0 or not math.isfinite(options.factor):
        raise ArgumentError(f"--factor must be a number above 0, got {options.factor}")
    check_files(data=options.data)

    from lit_edit.console.fit_parser import FitParser
    from lit_edit.files.paths import write_json, write_text
    from lit_edit.runs.results import ResultsFolder
    from lit_edit.stream.replay import check_request
    from lit_edit.studies.hard_facts.mining import Miner, SingleEdit, as_records, choose_hard

    parser = FitParser()
    settings = parser.parse([*_words(options), *rest])
    made = parser.make()
    stream, data = made.model, made.data
    data.read()
    name = f"{Path(options.method).stem}-{stream.language_model.name}"
    with results_folder(options.out, "hard", name) as out:
        folder = ResultsFolder(out, SingleEdit.from_dict, "search", "records.jsonl")
        tried = folder.open(_essence(settings, data.perplexity_texts, options.bos))
        done = {edit.id: edit for edit in tried}
        for request in data.requests:
            if request.id in done:
                check_request(request, done[request.id].request)
        # Keeps what the editor draws at random before the first edit, and the kernels: the same in each process.
        stream.journal = str(out / "journal")
        session = stream.open()
        miner = Miner(session, stream.tokenizer, data.perplexity_texts, options.bos)
        rows = _mine(miner, data.requests, done, folder)
        hard = choose_hard(rows, options.factor, options.keep)
        requests = {request.id: request for request in data.requests}
        write_json(out / "hard.json", as_records(hard, requests))
        text = _describe(miner, rows, hard, requests, options)
        write_text(out / "worst.md", text)
    sys.stdout.write(f"{text}\nEverything is in {out}/ (records.jsonl, hard.json, worst.md)\n")
    if hard:
        path = out / "hard.json"
        sys.stdout.write(f"Edit with them: lit-edit fit --config counterfact --data.path {path}\n")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "mine-hard",
        "Find the single edits that break a model (HardCF, arXiv 2402.09656): makes each edit of a file alone on the "
        "original model, measures the perplexity of ordinary text after it, and writes the worst as a data set. Given "
        "again the command goes on where it was cut, and takes more edits, another --limit, --factor or --keep.",
        settings=True,
    )
    parser.usage = "%(prog)s [options] [--NAME.OF.A.SETTING VALUE ...]"
    parser.epilog = (
        "Settings are named as for lit-edit fit, for example --model.editor.init_args.layers [5]. In OUT: "
        "records.jsonl (all edits, as they come), hard.json (the hard ones, as lit-edit fit reads them), worst.md."
    )
    parser.add_method("method/rome")
    parser.add_model(None, help="packaged model, folder or hub id; by default smollm2-135m")
    parser.add_data("edits, as for lit-edit fit; by default the built-in", type=Path)
    parser.add_limit("try at most so many")
    parser.add_argument("--offset", type=int, default=0, help="leave out so many at the beginning")
    text = "whose perplexity is measured: a line each, or records with a 'text' field (ME-PPL's); by default sentences "
    parser.add_argument("--texts", type=Path, default=None, metavar="FILE", help=f"{text}that ship")
    parser.add_argument("--bos", action="store_true", help="put the tokenizer's leading tokens before each text")
    which = parser.add_mutually_exclusive_group()
    text = "hard: perplexity is above so many times that of the base"
    which.add_argument("--factor", type=float, default=2.0, help=text)
    which.add_argument("--keep", type=positive, default=None, help="hard: so many of the worst, whatever they do")
    parser.add_out("folder to write to (default: runs/hard/METHOD-MODEL)")
    return parser


def _words(options: argparse.Namespace) -> list[str]:
    """Return the arguments of the ``lit-edit fit`` whose editor and data are used."""
    words = ["--config", "counterfact", "--config", options.method, f"--data.offset={options.offset}"]
    words += ["--data.source=builtin"] if options.data is None else [f"--data.path={options.data.resolve()}"]
    words += [] if options.limit is None else [f"--data.limit={options.limit}"]
    words += [] if options.model is None else [f"--model.language_model.name={options.model}"]
    return words + ([] if options.texts is None else [f"--data.perplexity_path={options.texts.resolve()}"])


def _essence(settings: dict[str, Any], texts: Sequence[str], bos: bool) -> dict[str, Any]:
    """Return what the numbers depend on. Each edit is tried alone: those that are tried beside it are none of it."""
    model = settings["model"]
    return {
        "model": model["language_model"],
        "editor": model["editor"],
        "statistics": {name: value for name, value in model["statistics"].items() if name not in ("cache", "force")},
        "texts": {"sha256": hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest(), "bos": bos},
    }


def _mine(miner: Miner, requests: Sequence[EditRequest], done: dict[str, SingleEdit], folder: Any) -> list[SingleEdit]:
    """Try what has not been tried; return the edits of all requests."""
    from dataclasses import asdict

    from tqdm import tqdm

    rows = []
    known = sum(request.id in done for request in requests)
    worst = max((row.ratio for row in done.values() if not row.refused), default=0.0)
    with tqdm(total=len(requests), initial=known, desc="single edits", unit="edit") as bar:
        for request in requests:
            row = done.get(request.id)
            if row is None:
                row = miner.try_edit(request)
                folder.append(asdict(row))
                worst = worst if row.refused else max(worst, row.ratio)
                bar.set_postfix_str(f"worst {worst:.4g} times")
                bar.update()
            rows.append(row)
    return rows


def _describe(
    miner: Miner,
    rows: Sequence[SingleEdit],
    hard: Sequence[SingleEdit],
    requests: dict[str, EditRequest],
    options: argparse.Namespace,
) -> str:
    """Return counts and the table of the worst, as Markdown."""
    from lit_edit.studies.hard_facts.mining import choose_hard
    from lit_edit.sweeps.outputs import as_markdown

    worst = choose_hard(rows, keep=SHOWN)
    refused = [row for row in rows if row.refused]
    rule = f"above {options.factor:g} times it" if options.keep is None else f"the worst {options.keep}"
    lines = [
        f"{len(rows)} single edits, {options.method}; perplexity of the unedited model {miner.base['mean']:.4g}",
        f"hard ({rule}): {len(hard)}",
    ]
    if refused:
        lines.append(f"refused: {len(refused)}, the first: {refused[0].id}: {refused[0].refused}")
    text = "".join(f"- {line}\n" for line in lines)
    return f"{text}\n{as_markdown([_cells(row, requests[row.id]) for row in worst])}" if worst else text


def _cells(row: SingleEdit, request: EditRequest) -> dict[str, str]:
    return {
        "id": row.id,
        "edit": f"{request.text} -> {request.target_new}".replace("\n", " "),
        "perplexity": _number(row.perplexity["mean"], ".4g"),
        "times base": _number(row.ratio, ".4g"),
        "target probability": f"{_number(row.probability_before, '.3f')} -> {_number(row.probability, '.3f')}",
        "growth of mean |W|": _number(row.growth, "+.1%"),
    }


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "not finite"
