"""``export`` and ``apply``: taking edits out of a run, and into a model."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_edit.console.arguments import make_parser, positive
from lit_edit.errors import ArgumentError, counted
from lit_edit.files.paths import expand
from lit_edit.runs.reading import check_finished

if TYPE_CHECKING:
    from lit_edit.export.lora import LowRank
    from lit_edit.runs.folder import OpenRun

_NAMES = {"model": "edited", "delta": "edited.safetensors", "lora": "lora"}
_ROWS = (
    ("efficacy", "success"),
    ("efficacy", "accuracy"),
    ("generalization", "success"),
    ("generalization", "accuracy"),
    ("locality", "agreement"),
)


def run_export(args: list[str]) -> None:
    """Write what a run edited as a model, as a file of deltas, or as an adapter."""
    parser = make_parser("export", "Take away what a run edited.")
    parser.add_run()
    parser.add_argument(
        "--as",
        dest="kind",
        choices=tuple(_NAMES),
        default="model",
        help="a Hugging Face folder with the whole edited model; one file with what was added to the weights, for "
        "lit-edit apply; or a LoRA adapter for peft",
    )
    parser.add_out("a new folder (for a delta, a new file); by default in the run folder")
    parser.add_argument(
        "--rank", type=positive, default=None, help="largest rank of the adapter; by default as large as it takes"
    )
    options = parser.parse_args(args)
    if options.rank is not None and options.kind != "lora":
        parser.error("--rank belongs to --as lora")
    check_finished(options.run)

    from lit_edit.export.model import check_export_file, check_export_folder
    from lit_edit.runs.folder import open_run

    target = expand(options.out or options.run / _NAMES[options.kind])
    (check_export_file if options.kind == "delta" else check_export_folder)(target)  # before a model is loaded
    run = open_run(options.run)
    run.apply()
    {"model": _write_model, "delta": _write_delta, "lora": _write_lora}[options.kind](run, target, options)


def run_apply(args: list[str]) -> None:
    """Write an exported delta into its base model and keep the result as a Hugging Face folder."""
    parser = make_parser("apply", "Write an exported delta into the model it was made on.")
    parser.add_argument("--delta", required=True, type=Path, help="a file that lit-edit export --as delta wrote")
    parser.add_model(None, required=True, help="the base model: packaged model, folder or hub id")
    parser.add_out("a new folder; by default that of the file, without its suffix")
    options = parser.parse_args(args)
    if not expand(options.delta).exists():
        raise ArgumentError(f"--delta {options.delta} cannot be read: there is no such file")

    from lit_edit.export.delta import edit_with, read_delta
    from lit_edit.export.model import check_export_folder, export_model

    file = read_delta(expand(options.delta))
    target = expand(options.out or file.path.with_suffix(""))
    check_export_folder(target)
    model, tokenizer = file.base_at(options.model).load()
    ledger = edit_with(model, file)
    export_model(model, tokenizer, ledger, target, options.model)
    _say_where(target)


def _write_model(run: OpenRun, target: Path, options: argparse.Namespace) -> None:
    from lit_edit.export.model import export_model

    export_model(run.ledger.adapter.model, run.tokenizer, run.ledger, target, run.language_model.name)
    _say_where(target)


def _write_delta(run: OpenRun, target: Path, options: argparse.Namespace) -> None:
    from lit_edit.export.delta import export_delta

    export_delta(run.ledger, target, run.base_hash, run.language_model)
    sys.stdout.write(
        f"What {counted(len(run.ledger.entries), 'edit')} added is in {target}. Write it into the base model with\n"
        f"  lit-edit {shlex.join(['apply', '--delta', str(target), '--model', run.language_model.name])}\n"
    )


def _write_lora(run: OpenRun, target: Path, options: argparse.Namespace) -> None:
    from lit_edit.export.lora import export_lora

    parts = export_lora(run.ledger, target, run.language_model, options.rank)
    rank = next(iter(parts.values())).up.shape[1]
    if all(part.exact for part in parts.values()):
        sys.stdout.write(f"The adapter of rank {rank} holds the edits to float32 round-off.\n")
    else:
        needed = max(part.needed for part in parts.values())
        sys.stdout.write(f"The adapter of rank {rank} is an approximation: nothing would be lost at rank {needed}.\n")
        sys.stdout.write("Relative error of the updates (Frobenius):\n")
        for name, part in parts.items():
            sys.stdout.write(f"  {name}: {part.error:.2g} (rank of the whole update: {part.needed})\n")
        _show_cost(run, parts, rank)
    sys.stdout.write(
        f"The adapter is in {target}. Load it onto {run.language_model.name}, unedited, with\n"
        f'  peft.PeftModel.from_pretrained(base_model, "{target}")\n'
    )


def _say_where(target: Path) -> None:
    sys.stdout.write(
        f"The edited model is in {target}. Load it with\n"
        f'  transformers.AutoModelForCausalLM.from_pretrained("{target}")\n'
    )


def _show_cost(run: OpenRun, parts: Mapping[str, LowRank], rank: int) -> None:
    """Measure the truncated model beside the edited one."""
    requests = run.requests
    if not requests:
        sys.stdout.write("What that costs cannot be measured: the run has no requests with their probes on record.\n")
        return

    from rich.console import Console

    from lit_edit.console.tables import table_of
    from lit_edit.export.lora import measure_truncation

    summaries = measure_truncation(run.ledger, run.tokenizer, requests, parts)
    rows = [(f"{kind} {name}", *(_number(summary[kind].get(name)) for summary in summaries)) for kind, name in _ROWS]
    Console().print(table_of(("", ">edited model", f">rank {rank}"), rows, title=counted(len(requests), "edit")))


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}"
