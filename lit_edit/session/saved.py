"""Keeping a session in a folder: that of a run, which the command line reads too."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from lit_edit.errors import ArgumentError
from lit_edit.files.paths import without_nan, write_atomically, write_json
from lit_edit.ledger.journal import Journal
from lit_edit.ledger.left_out import left_out
from lit_edit.metrics.evaluation import summarise
from lit_edit.runs.answers import write_answers
from lit_edit.runs.files import journal_path, run_lock, write_run_files
from lit_edit.runs.reading import RunError
from lit_edit.session.changing import Changing
from lit_edit.session.described import describe


def save(session: Changing, folder: Path | None) -> Path:
    """Let a session go on in a folder, and return it; see ``Session.save``."""
    folder = session.folder if folder is None else folder.resolve()
    if folder is None:
        raise ArgumentError("save wants a folder: this session is in none yet")
    if folder != session.folder:
        config = yaml.safe_dump({"model": _settings(session)}, sort_keys=False, allow_unicode=True)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunError(f"{folder} holds something already: name a new folder")
        session.base_hash  # the journal begins with it  # noqa: B018
        folder.mkdir(parents=True, exist_ok=True)
        session.close()
        session.held.enter_context(run_lock(folder, "folder"))
        write_atomically(folder / "config.yaml", lambda path: path.write_text(config, encoding="utf-8"))
        session.ledger.take_up(Journal(journal_path(folder)))
        session.folder = folder
    return folder


def write_files(session: Changing, folder: Path) -> None:
    """Write the files that follow from the journal."""
    ledger, results = session.ledger, session.results
    write_answers(folder, ledger.history, results, session.tokenizer)
    ids = [entry.id for entry in ledger.entries]
    stages = {name: [found[i] for i in ids if i in found] for name, found in results.items()}
    summary = {
        "edits": len(ids),
        "undone": len(ledger.history.undone),
        "refused": len(ledger.history.refused),
        "left_out": left_out(ledger.journal.records),
        **{name: summarise(found, results["base"]) for name, found in stages.items() if found},
        "layers": ledger.layer_norms(),
    }
    write_json(folder / "summary.json", without_nan(summary))
    write_run_files(folder, ledger, session.base_hash, results)


def _settings(session: Changing) -> dict[str, Any]:
    """Return what ``config.yaml`` holds under ``model``."""
    named = session.language_model
    dtype = str(session.model.dtype).removeprefix("torch.")
    model = {f.name: getattr(named, f.name) for f in fields(named) if f.init and f.name != "arch"} | {"dtype": dtype}
    if named.arch is not None:
        model["arch"] = {f.name: getattr(named.arch, f.name) for f in fields(named.arch)}
        model["arch"]["model_types"] = list(named.arch.model_types)
    return {
        "language_model": model,
        "editor": describe(session.editor),
        "statistics": {f.name: getattr(session.statistics, f.name) for f in fields(session.statistics)},
        "on_conflict": session.on_conflict,
        "on_refused": session.on_refused,
    }
