"""What the scripts have in common: options, the model, the edits, and where results go."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from lit_edit import LanguageModel
from lit_edit.data.datamodule import EditDataModule
from lit_edit.data.request import EditRequest
from lit_edit.editors.base import Editor, silent
from lit_edit.ledger.edit_ledger import EditLedger
from lit_edit.models import ModelAdapter


def make_parser(text: str, edits: int | None = None) -> argparse.ArgumentParser:
    """Return a parser with --json; with --data, --edits and --tokens too where so many edits are made by default."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="write the results to this file")
    if edits is not None:
        parser.add_argument("--data", default=None, help="a file of edits; by default the built-in facts")
        parser.add_argument("--edits", type=int, default=edits)
        parser.add_argument("--tokens", type=int, default=20_000, help="tokens of the key statistics")
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2-135m")


def load_model(name: str) -> tuple[ModelAdapter, Any]:
    """Return a model and its tokenizer."""
    model, tokenizer = LanguageModel(name).load()
    return ModelAdapter(model), tokenizer


def read_data(path: str | None, edits: int, **more: Any) -> EditDataModule:
    return EditDataModule("builtin" if path is None else "file", path, edits, **more).read()


def make_edits(
    editor: Editor,
    ledger: EditLedger,
    requests: Sequence[EditRequest],
    window: int,
    status: Callable[[str], None] = silent,
) -> Iterator[dict[str, float]]:
    """Make edits one by one, with targets fitted a window at a time; yield the seconds of each by phase."""
    for number, request in enumerate(requests):
        first = number // window * window
        proposal = editor.propose([request], requests[first : first + window], status)
        start = perf_counter()
        ledger.commit(proposal.updates, proposal.entries)
        editor.accept(proposal)
        yield {**proposal.seconds, "solve": proposal.seconds["solve"] + perf_counter() - start}


def write_result(path: Path | None, result: Any) -> None:
    if path is not None:
        path.write_text(json.dumps(result, indent=1))
