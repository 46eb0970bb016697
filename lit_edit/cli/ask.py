"""``ask``: the base model and the edited model of a run, side by side."""

from __future__ import annotations

import argparse

from lit_edit.console.arguments import make_parser, positive
from lit_edit.console.terminal import write_json
from lit_edit.errors import counted
from lit_edit.runs.reading import check_finished


def run_ask(args: list[str]) -> None:
    """Show the continuations of some prompts, of both models."""
    parser = make_parser("ask", "Show how the base model and the edited model of a run continue a prompt.")
    parser.add_argument("prompt", nargs="+", type=_prompt, help="one or more prompts, each in quotes")
    parser.add_run()
    parser.add_argument("--tokens", type=positive, default=20, help="length of the continuation")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    options = parser.parse_args(args)
    check_finished(options.run)

    from rich.console import Console

    from lit_edit.console.tables import table_of
    from lit_edit.models.generation import continue_greedily
    from lit_edit.runs.folder import open_run

    run = open_run(options.run)
    before = [continue_greedily(run.ledger.adapter, run.tokenizer, p, options.tokens) for p in options.prompt]
    run.apply()
    after = [continue_greedily(run.ledger.adapter, run.tokenizer, p, options.tokens) for p in options.prompt]
    rows = list(zip(options.prompt, before, after, strict=True))
    if options.json:
        write_json([{"prompt": prompt, "base": base, "edited": edited} for prompt, base, edited in rows])
        return
    Console().print(
        table_of(("prompt", "base model", f"after {counted(len(run.entries), 'edit')}"), rows, show_lines=True)
    )


def _prompt(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("a prompt must not be empty")
    return text
