"""Where a run that was cut goes on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_edit.data.datamodule import EditDataModule
from lit_edit.errors import ArgumentError
from lit_edit.files.changes import refuse_changes
from lit_edit.files.paths import expand, sync_folder
from lit_edit.files.trees import CheckpointError, check_tree, load_tree
from lit_edit.ledger.history import EditHistory
from lit_edit.ledger.journal import Journal
from lit_edit.runs.files import journal_path
from lit_edit.stream.position import dealt_with

log = logging.getLogger(__name__)

OF_ONE_RUN = ("config", "run_name", "runs_dir", "resume", "overwrite", "ckpt_path", "weights_only")
"""Settings that change nothing of what comes of a run."""
_OF_NO_ACCOUNT = (
    *("model.measure_each", "model.journal", "model.changed", "model.on_refused", "model.on_conflict"),
    *("model.statistics.cache", "model.statistics.force"),
)
"""Settings of a stream that an ended run may have otherwise: what was made stays what it is."""
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


def check_same(folder: Path, config: str) -> bool:
    """Tell whether a run that has come to its end has dealt with all data; what differs is refused by name.

    Args:
        folder: The run's.
        config: All settings that are asked for now, as YAML.

    Raises:
        ArgumentError: For another seed, another model or other settings, and for other data as on a run that was cut.
    """
    check_settings(folder, config)
    return has_all(folder, yaml.safe_load(config)["data"])


def has_all(folder: Path, data: Mapping[str, Any]) -> bool:
    """Tell whether a run's journal deals with all edits of a stream, given as settings; refuse if it is another's.

    What stands behind the same beginning is left to do: the run goes on with it in place.
    """
    requests = EditDataModule(**data).read().requests
    history = EditHistory.of(Journal(journal_path(folder), writable=False).records)
    try:
        return dealt_with(history, requests, data["batch_size"]) >= len(requests)
    except MisconfigurationException as error:
        raise ArgumentError(str(error)) from error


def check_settings(folder: Path, config: str, only: Sequence[str] = ("seed_everything", "model")) -> None:
    """Refuse settings that decide about numbers and differ from those that a run was made with, by name.

    ``only`` are looked at; those of a model that was not loaded yet are the journal's to compare.
    """
    try:
        then = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return  # cut before it was written, or damaged: the journal knows
    now = yaml.safe_load(config)
    refuse_changes(
        "the run was made",
        {part: then.get(part) for part in only},
        {part: now.get(part) for part in only},
        "use the config that they were made with, or start a run of another name",
        lambda name: name not in _OF_NO_ACCOUNT,
    )


def newest_whole(folder: Path) -> Path | None:
    """Return the newest checkpoint in a folder that is whole, to the last bit; those that are not are named."""
    files = {path.resolve() for path in folder.glob("*.ckpt") if path.is_file()}
    for path in sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True):
        try:
            check_tree(path)
        except CheckpointError as error:
            log.warning("%s is damaged and not used: %s", path, error)
            continue
        return path
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
