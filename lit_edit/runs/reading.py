"""What the folder of a run says without opening its model."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_edit.errors import UserError, did_you_mean
from lit_edit.files.paths import expand
from lit_edit.ledger.history import EditHistory, has_end
from lit_edit.ledger.journal import Journal
from lit_edit.runs.answers import answers_of, read_answers
from lit_edit.runs.files import current_rows, deltas_path, edit_rows, journal_path
from lit_edit.runs.holding import TAKEN_OUT, Verdict, counts, failures, judge

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lit_edit.runs.files import Results


log = logging.getLogger(__name__)


class RunError(UserError):
    """A run folder that cannot be opened; the message says why."""


def has_ended(folder: Path) -> bool:
    """Tell whether a run has come to its end and everything it leaves behind is written."""
    path = journal_path(folder)
    return path.is_file() and has_end(Journal(path, writable=False).records)


def find_folder(folder: Path) -> Path:
    """Return the folder of a run, with ``~`` put in full; a bare name may be that of a run below ``runs/``.

    Raises:
        RunError: If there is none.
    """
    folder = expand(folder)
    below = Path("runs") / folder
    if not folder.is_dir() and not folder.is_absolute() and below.is_dir():
        return below
    if not folder.is_dir():
        names = [path.name for path in Path("runs").iterdir() if path.is_dir()] if Path("runs").is_dir() else []
        raise RunError(f"there is no run folder {folder}{did_you_mean(folder.name, names)}")
    return folder


def check_folder(folder: Path) -> Path:
    """Return the folder of a run that has got as far as its settings; :class:`RunError` if it is none."""
    folder = find_folder(folder)
    if not (folder / "config.yaml").is_file():
        raise RunError(f"{folder} is no finished run (no config.yaml)")
    return folder


def check_finished(folder: Path) -> Path:
    """Return the folder of a run whose edited model can be opened, cut or not; :class:`RunError` if it is none."""
    folder = check_folder(folder)
    cut = journal_path(folder).is_file() and bool(read_history(folder).made)
    if not deltas_path(folder).is_file() and not has_ended(folder) and not cut:
        raise RunError(
            f"{folder} is no finished run (no {deltas_path(folder).name}); if the run was interrupted, finish it: "
            f"lit-edit fit --config {folder}/config.yaml --resume auto"
        )
    return folder


def say_if_cut(folder: Path) -> None:
    """Warn that a run has not come to its end: what it has made until then is what there is."""
    folder = expand(folder)
    if not (folder / "config.yaml").is_file() or not journal_path(folder).is_file() or has_ended(folder):
        return
    made = len(read_history(folder).made)
    again = f"lit-edit fit --config {folder}/config.yaml --resume auto"
    log.warning("%s was not finished: it has made %d edit%s; go on with %s", folder, made, "s" * (made != 1), again)


def read_history(folder: Path) -> EditHistory:
    """Return what the journal of a run says, without opening a model or changing a file."""
    return EditHistory.of(_records(folder))


def _records(folder: Path) -> list[dict[str, Any]]:
    folder = find_folder(folder)
    if not journal_path(folder).is_file():
        raise RunError(f"{folder} has no journal ({journal_path(folder)}): it is no run of this version of lit-edit")
    return Journal(journal_path(folder), writable=False).records


@dataclass(frozen=True)
class EditLog:
    """The edits of a run, as its folder tells them."""

    rows: list[dict[str, Any]]  # as in ledger/edits.jsonl, one per edit ever made
    verdicts: list[Verdict]  # what has become of them, and behind them of the edits that were refused
    times: dict[int, str]  # by number: when an edit was made

    def as_list(self) -> list[dict[str, Any]]:
        """Return a row per edit with its verdict, for programs."""
        rows = {row["number"]: row for row in self.rows}
        return [{**rows.get(v.number, {}), **v.as_dict(), "time": self.times.get(v.number or 0)} for v in self.verdicts]


def read_log(folder: Path) -> EditLog:
    """Return what the folder of a run says of its edits, without opening a model or changing a file."""
    records, folder = _records(folder), expand(folder)
    rows = current_rows(folder, EditHistory.of(records))
    return EditLog(rows, judge(rows, read_answers(folder), records), _times(records))


def log_of(
    history: EditHistory,
    records: Sequence[Mapping[str, Any]],
    results: Results,
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any]]:
    """Return a row per edit with its verdict, of edits that are in no folder; arguments as of :func:`write_answers`."""
    rows = edit_rows(history, results)
    answers = answers_of(history, results, tokenizer)
    return EditLog(rows, judge(rows, answers, records), _times(records)).as_list()


def _times(records: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    return {entry["number"]: record.get("time", "") for record in records for entry in record.get("entries", ())}


def read_outcome(folder: Path) -> dict[str, Any]:
    """Return what a program wants to know of a run: counts, main numbers of its summary, and what does not hold."""
    verdicts = read_log(folder).verdicts
    path = expand(folder) / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {
        "run": str(folder),
        "ended": has_ended(expand(folder)),
        "edits": counts(verdicts),
        **{stage: summary.get(stage) for stage in ("base", "immediate", "final", "seconds")},
        "failures": [verdict.as_dict() for verdict in failures(verdicts)],
        "taken_out": [verdict.as_dict() for verdict in verdicts if verdict.state in TAKEN_OUT],
    }
