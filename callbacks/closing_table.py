"""What is said at the end: before and after, what it cost, and which edits hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from lit_edit.ability.course import mean_accuracy
from lit_edit.errors import counted
from lit_edit.report.reading import look_up
from lit_edit.runs.answers import answers_of
from lit_edit.runs.files import edit_rows
from lit_edit.runs.holding import Verdict, closing_lines, judge
from lit_edit.runs.names import shown
from lit_edit.stream.edit_stream import EditStream

from .base import as_stream
from .retention import missed_edits

_ROWS = (
    ("efficacy", "success"),
    ("efficacy", "accuracy"),
    ("generalization", "success"),
    ("generalization", "accuracy"),
    ("locality", "success"),
    ("locality", "accuracy"),
    ("locality", "agreement"),
)

# Of the callbacks ProtocolMetrics and MEPerplexity, if they are there.
_WRITTEN = (
    ("efficacy accuracy, generated", ("generation", "efficacy", "accuracy")),
    ("generalization acc., generated", ("generation", "generalization", "accuracy")),
    ("fluency (bits)", ("fluency",)),
    ("consistency", ("consistency",)),
    ("ME-PPL", ("me_perplexity", "mean")),
)

_BESIDE = (("undone", "taken out or replaced"), ("refused", "not made"))
_SECTION = "section"


class ClosingTable(Callback):
    """Prints the summary of a finished stream, and below it which edits do not hold, and why."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print it."""
        stream = as_stream(pl_module, self)
        summary = stream.finish()
        if trainer.is_global_zero:
            console = Console()
            console.print(summary_table(summary), *([layers_table(summary)] if summary["layers"] else []))
            run = None if stream.journal is None else shown(Path(stream.journal).parent.parent)
            for line in closing_lines(_verdicts(trainer, stream), run):
                console.print(line, markup=False, highlight=False, soft_wrap=True)


def _verdicts(trainer: Trainer, stream: EditStream) -> list[Verdict]:
    ledger = stream.ledger
    rows = edit_rows(ledger.history, stream.results, missed_edits(trainer))
    return judge(rows, answers_of(ledger.history, stream.results, stream.tokenizer), ledger.journal.records)


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Return the metrics before, right after each edit, and at the end; what has no value at all is left out."""
    beside = [f"{summary[name]} {what}" for name, what in _BESIDE if summary.get(name)]
    if broken := sum(row["kind"] == "broken" for row in summary.get("left_out", ())):
        beside.append(f"{counted(broken, 'broken record')} left out")
    stages = [summary[stage] for stage in ("base", "immediate", "final")]
    ability = [mean_accuracy(summary, stage) for stage in ("base", "final")]
    before, after = summary["base"]["perplexity"], summary["final"]["perplexity"]
    change = f" ({after / before - 1:+.1%})" if before and after else ""
    told = None if after is None else f"{after:.1f}{change}"
    rows = [
        *((f"{kind} {name}", [_number(stage[kind].get(name)) for stage in stages]) for kind, name in _ROWS),
        ("score (harmonic mean of success)", [_number(stage["score"]) for stage in stages]),
        (_SECTION, []),
        *((label, [_number(look_up(stage, *path)) for stage in stages]) for label, path in _WRITTEN),
        ("general ability (mean accuracy)", [_number(ability[0]), "", _number(ability[1])]),
        ("perplexity", [_number(before, 1), "", told]),
        ("seconds per edit", ["", "", _number(summary["seconds"]["per_edit"], 2)]),
    ]
    kept = [(label, cells) for label, cells in rows if any(cells) or label == _SECTION]
    columns = [at for at in range(3) if any(cells[at] for _, cells in kept if cells)]
    table = Table(title=", ".join([counted(summary["edits"], "edit"), *beside]), title_justify="left")
    table.add_column("")
    for at in columns:
        table.add_column(("before", "after each edit", "after all edits")[at], justify="right")
    for label, cells in kept:
        if label == _SECTION:
            table.add_section()
        else:
            table.add_row(label, *("–" if cells[at] is None else cells[at] for at in columns))
    return table


def layers_table(summary: Mapping[str, Any]) -> Table:
    """Return mean |W| of the edited layers before and after."""
    table = Table(title="mean |W| of the edited layers", title_justify="left")
    for column in ("", "before", "after", "change", "mean |ΔW|"):
        table.add_column(column, justify="right" if column else "left", no_wrap=not column)
    for name, norms in summary["layers"].items():
        before, after = norms["mean_abs_before"], norms["mean_abs_after"]
        table.add_row(
            name, f"{before:.5f}", f"{after:.5f}", f"{after / before - 1:+.2%}", f"{norms['mean_abs_delta']:.5f}"
        )
    return table


def _number(value: float | None, digits: int = 3) -> str | None:
    return None if value is None else f"{value:.{digits}f}"
