"""What a run's ``metrics.csv`` says of the model as it is, also once edits were taken out or put back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lit_edit.files.metric_rows import read_rows
from lit_edit.loggers.run_csv import RunCSVLogger
from lit_edit.metrics.evaluation import Summary, flatten

if TYPE_CHECKING:
    from lit_edit.ledger.edit_ledger import EditLedger


def logged_norms(norms: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return :meth:`EditLedger.layer_norms` under the names that logs have."""
    names = {"mean_abs_w": "mean_abs_after", "mean_abs_delta": "mean_abs_delta", "relative_change": "relative_change"}
    return {f"norm/{weight}/{name}": of_it[key] for weight, of_it in norms.items() for name, key in names.items()}


def update_metrics(folder: Path, ledger: EditLedger, final: Summary | None) -> None:
    """Bring the last row of ``metrics.csv`` up to edits that were taken out or put back after the end.

    Curves and figures end in it. What was not logged, or not measured now, stays as it was.
    """
    path = folder / "metrics.csv"
    if not path.is_file():
        return
    columns = read_rows(path)[0]
    norms = {name: value for name, value in logged_norms(ledger.layer_norms()).items() if name in columns}
    logger = RunCSVLogger(str(folder))
    if final is not None:  # what cannot be measured any more, of edits that are gone, is left out
        logger.forget([name for name in columns if name.startswith(("final/", "retention/"))], ledger.made)
    logger.log_metrics(norms | ({} if final is None else flatten(final, "final")), step=ledger.made)
    logger.save()
