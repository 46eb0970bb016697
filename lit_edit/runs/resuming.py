"""Where a run that was cut goes on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import yaml

from lit_edit.files.paths import expand, sync_folder
from lit_edit.files.trees import load_tree
from lit_edit.ledger.journal import Journal
from lit_edit.runs.files import journal_path

log = logging.getLogger(__name__)

OF_ONE_RUN = ("config", "run_name", "runs_dir", "resume", "overwrite", "ckpt_path", "weights_only")
"""Settings that change nothing of what comes of a run."""
_PLACES = ("save_dir", "name", "version", "dirpath", "default_root_dir")


def mend_journal(folder: Path) -> None:
    """Set the damaged part of a run's journal aside: the edits in it are made again."""
    path = journal_path(folder)
    if path.is_file():
        Journal(path, repair=True)


def remove_parts(folder: Path) -> None:
    """Remove what a process that was killed has left half written; nobody else works in the folder."""
    for path in (folder, folder / "ledger", folder / "checkpoints"):
        for part in path.glob(".*.part"):
            part.unlink(missing_ok=True)


def find_run(runs: Path, config: str) -> Path | None:
    """Return the newest run folder with the same settings, given as YAML."""
    wanted = _comparable(config)
    same = [
        path
        for path in runs.glob("*/config.yaml")
        if journal_path(path.parent).is_file() and _comparable(path.read_text(encoding="utf-8")) == wanted
    ]
    return max(same, key=lambda path: journal_path(path.parent).stat().st_mtime).parent if same else None


def run_of_config(configs: list[Any]) -> Path | None:
    """Return the run folder that one of the given config files lies in, if one does."""
    for config in configs:
        path = expand(str(config)).resolve()
        if path.name == "config.yaml" and journal_path(path.parent).is_file():
            return path.parent
    return None


def adopt_journal(checkpoint: Path, folder: Path) -> None:
    """Give a run that goes on from another run's checkpoint the records that lead there."""
    source, target = journal_path(checkpoint.resolve().parent.parent), journal_path(folder)
    if source == target or not source.is_file() or target.is_file():
        return
    position = load_tree(checkpoint, "meta")["lit_edit"]["ledger"]["position"]
    part = target.with_suffix(".part")
    part.unlink(missing_ok=True)
    journal = Journal(part)
    Journal(source, writable=False).copy_to(journal, position)
    part.replace(target)
    sync_folder(target.parent)


def warn_if_behind(checkpoint: Path) -> None:
    """Say so if a run's edits have changed since a checkpoint: it is the model as it was then that is measured."""
    path = journal_path(checkpoint.resolve().parent.parent)
    if not path.is_file():
        return
    position = load_tree(checkpoint, "meta")["lit_edit"]["ledger"]["position"]
    later = [r for r in Journal(path, writable=False).records[position:] if r["kind"] in ("edit", "undo", "redo")]
    if later:
        log.warning(
            "%s is behind its run by %d changes (edits made, taken out or put back since): what is measured is the "
            "model of then. lit-edit undo and redo measure the model of now",
            checkpoint,
            len(later),
        )


def _comparable(text: str) -> Any:
    """Return settings without what belongs to one run alone; ``None`` for a file that cannot be read."""
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    if not isinstance(config, dict):
        return None
    own = {name: value for name, value in config.items() if name not in OF_ONE_RUN}
    return {**own, "trainer": _without_places(own.get("trainer"))}


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_places(part) for name, part in value.items() if name not in _PLACES}
    return [_without_places(part) for part in value] if isinstance(value, list) else value
