"""The table at the end: before and after, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from lit_edit.ability.course import mean_accuracy

from .base import as_stream

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


class ClosingTable(Callback):
    """Prints the summary of a finished stream."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print it."""
        summary = as_stream(pl_module, self).finish()
        if trainer.is_global_zero:
            tables = [summary_table(summary), *([layers_table(summary)] if summary["layers"] else [])]
            Console().print(*tables)


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Return the metrics before, right after each edit, and at the end."""
    beside = [f"{summary[name]} {what}" for name, what in _BESIDE if summary.get(name)]
    table = Table(title=", ".join([f"{summary['edits']} edits", *beside]), title_justify="left")
    for column in ("", "before", "after each edit", "after all edits"):
        table.add_column(column, justify="left" if not column else "right")
    stages = [summary[stage] for stage in ("base", "immediate", "final")]
    for kind, name in _ROWS:
        table.add_row(f"{kind} {name}", *(_number(stage[kind].get(name)) for stage in stages))
    table.add_row("score (harmonic mean of success)", *(_number(stage["score"]) for stage in stages), end_section=True)
    written = [(label, [_at(stage, path) for stage in stages]) for label, path in _WRITTEN]
    for label, values in written:
        if any(value is not None for value in values):
            table.add_row(label, *map(_number, values))
    ability = [mean_accuracy(summary, stage) for stage in ("base", "final")]
    if ability[1] is not None:
        table.add_row("general ability (mean accuracy)", _number(ability[0]), "", _number(ability[1]))
    before, after = summary["base"]["perplexity"], summary["final"]["perplexity"]
    change = f" ({after / before - 1:+.1%})" if before and after else ""
    table.add_row("perplexity", _number(before, 1), "", _number(after, 1) + change)
    table.add_row("seconds per edit", "", "", _number(summary["seconds"]["per_edit"], 2))
    return table


def layers_table(summary: Mapping[str, Any]) -> Table:
    """Return mean |W| of the edited layers before and after."""
    table = Table(title="mean |W| of the edited layers", title_justify="left")
    for column in ("", "before", "after", "change", "mean |ΔW|"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=not column)
    for name, norms in summary["layers"].items():
        before, after = norms["mean_abs_before"], norms["mean_abs_after"]
        table.add_row(
            name, f"{before:.5f}", f"{after:.5f}", f"{after / before - 1:+.2%}", f"{norms['mean_abs_delta']:.5f}"
        )
    return table


def _at(stage: Any, path: tuple[str, ...]) -> float | None:
    for step in path:
        stage = None if stage is None else stage.get(step)
    return None if stage is None else float(stage)


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
