"""Opening a run: its settings, its edits, its model; and changing it after its end."""

from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from safetensors import SafetensorError, safe_open

from lit_edit.data.datamodule import perplexity_texts
from lit_edit.data.request import DataError, EditRequest
from lit_edit.editors.memory.engine import MemoryEditor
from lit_edit.errors import UserError, counted
from lit_edit.export.model import ExportError, apply_deltas, read_tensors
from lit_edit.files.paths import read_json_lines
from lit_edit.files.trees import CheckpointError, check_tree, load_tree
from lit_edit.ledger.edit_ledger import EditLedger, weights_state
from lit_edit.ledger.history import EditHistory, LedgerEntry
from lit_edit.ledger.journal import Journal
from lit_edit.ledger.ownership import other_base
from lit_edit.metrics.evaluation import Summary, summarise
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.language_model import LanguageModel
from lit_edit.models.spec import ArchSpec
from lit_edit.runs.answers import write_answers
from lit_edit.runs.files import deltas_path, journal_path, run_lock, update_summary, write_run_files
from lit_edit.runs.reading import RunError, check_finished, check_folder, read_history, say_if_cut
from lit_edit.stats.second_moment import weights_hash
from lit_edit.stream.edit_stream import EditStream
from lit_edit.stream.precision import cast_as
from lit_edit.stream.session import EditSession

log = logging.getLogger(__name__)


@dataclass
class OpenRun:
    """A run's model, unedited until :meth:`apply` is called, and what was edited."""

    folder: Path
    language_model: LanguageModel
    ledger: EditLedger
    tokenizer: Any
    entries: list[LedgerEntry]  # the edits that hold
    base_hash: str
    editor: MemoryEditor | None = None  # the run's, if it keeps its edits beside the weights

    @property
    def requests(self) -> list[EditRequest]:
        """The edits that hold, with their probes; those whose requests are not on record are left out."""
        return [EditRequest.from_dict(entry.request) for entry in self.entries if entry.request]

    def apply(self) -> None:
        """Write the run's updates into the model, or put its memory beside it."""
        apply_deltas(self.ledger, deltas_path(self.folder), self.base_hash)
        if self.editor is None:
            self.ledger.history = EditHistory.listing(self.entries)
            return
        journal = Journal(journal_path(self.folder), writable=False)
        self.ledger.journal, self.ledger.history = journal, EditHistory.of(journal.records)
        self.editor.resolve_layers(self.ledger.adapter)
        self.editor.prepare(self.ledger, self.tokenizer, {})
        EditSession(self.ledger, self.editor, self.language_model.name, self.base_hash).check()
        self.editor.recall()


def open_run(folder: Path) -> OpenRun:
    """Load the base model of a run and read what the run edited.

    Raises:
        RunError: If it is no finished run.
        WeightsChangedError: If the base model is not the one that the edits were made on.
    """
    folder = check_finished(folder)
    say_if_cut(folder)
    deltas = deltas_path(folder)
    _catch_up(folder)
    try:
        settings = dict(_read_config(folder)["model"]["language_model"])
        if settings.get("arch"):
            arch = dict(settings["arch"])
            settings["arch"] = ArchSpec(**{**arch, "model_types": tuple(arch.get("model_types", ()))})
        language_model = LanguageModel(**settings)
        with safe_open(deltas, "pt") as file:
            names = set(file.keys())
        entries = _entries(folder)
    except (yaml.YAMLError, KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
        raise RunError(f"{folder} cannot be opened: {error}") from error
    model, tokenizer = language_model.load()
    base_hash = weights_hash(model)
    adapter = ModelAdapter(model, language_model.arch, products=language_model.products)
    layers = [layer for layer in adapter.editable if adapter.weight_name(layer) in names]
    if len(layers) != len(names):
        raise RunError(f"{deltas} edits parameters that {language_model.name} does not have: {sorted(names)}")
    editor = stream_of(folder).editor if entries and not layers else None
    if editor is not None and not isinstance(editor, MemoryEditor):
        raise RunError(f"{folder} has edits and no updates: {deltas} does not belong to it")
    ledger = EditLedger(adapter, layers, adopt=True)  # that it is the run's base is seen by the hash
    begun = [r for r in _records(folder) if r["kind"] == "begin" and r["base_hash"] != base_hash]
    if begun:
        hashes = begun[-1]["base_hash"], base_hash
        raise other_base(language_model.name, begun[-1].get("parameters"), ledger.prints, hashes)
    cast_as(model, precision_of(folder))
    ledger.align()
    return OpenRun(folder, language_model, ledger, tokenizer, entries, base_hash, editor)


def _records(folder: Path) -> list[dict[str, Any]]:
    path = journal_path(folder)
    return Journal(path, writable=False).records if path.is_file() else []


def _read_config(folder: Path) -> dict[str, Any]:
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise TypeError("config.yaml holds no settings")
    return config


def precision_of(folder: Path) -> Any:
    """Return the precision that a run's Trainer was told to use; ``None`` if it was not."""
    return (_read_config(folder).get("trainer") or {}).get("precision")


def _entries(folder: Path) -> list[LedgerEntry]:
    """Return the edits that hold: from the journal, or the list of a run that has none."""
    if journal_path(folder).is_file():
        return read_history(folder).live
    return [
        LedgerEntry(row["id"], row["subject"], row["prompt"], row["target_new"])
        for row in read_json_lines(folder / "ledger" / "edits.jsonl")
        if row.get("status", "holds") == "holds"
    ]


def _catch_up(folder: Path) -> None:
    """Write the files of a run anew if they are behind its journal: a process may have died between the two."""
    path = journal_path(folder)
    if not path.is_file():
        return
    try:
        state = read_tensors(deltas_path(folder))[0].get("state")
    except ExportError:
        state = None
    if state != weights_state(Journal(path, writable=False)):
        log.warning("%s: the files are behind the journal, or damaged; they are written anew", folder)
        with open_for_change(folder) as run:
            if state is not None:
                update_summary(folder, run.stream.ledger, None)
            run.write()


@dataclass
class ChangingRun:
    """A run whose edits are being changed."""

    folder: Path
    stream: EditStream  # with the model as the journal left it
    session: EditSession  # makes the changes

    def measure(self) -> Summary:
        """Measure the edits that hold on the model as it is now."""
        stream = self.stream
        requests = [EditRequest.from_dict(entry.request) for entry in stream.ledger.entries]
        missing = [request for request in requests if request.id not in stream.results["base"]]
        stream.results["base"] |= stream.measure(missing, stream.ledger.original(), with_perplexity=False)[0]
        stream.results["final"] = stream.measure(requests, stream.adapter, with_perplexity=False)[0]
        perplexity = stream.measure_texts(self._texts(), stream.adapter).get("mean")
        return summarise(stream.results["final"].values(), stream.results["base"], perplexity)

    def _texts(self) -> list[str]:
        """Return the texts whose perplexity the run measures; none if they are not there any more."""
        try:
            return perplexity_texts((_read_config(self.folder).get("data") or {}).get("perplexity_path"))
        except (DataError, OSError, yaml.YAMLError, TypeError):
            return []

    def write(self) -> None:
        """Write the files that follow from the journal."""
        write_answers(self.folder, self.stream.ledger.history, self.stream.results, self.stream.tokenizer)
        write_run_files(self.folder, self.stream.ledger, self.stream.base_hash, self.stream.results)


@contextmanager
def open_for_change(folder: Path) -> Iterator[ChangingRun]:
    """Open a run at the end of its journal, for nobody else to work in meanwhile: :class:`RunLockedError`."""
    folder = check_folder(folder).resolve()
    if not journal_path(folder).is_file():
        raise RunError(f"{folder} has no journal ({journal_path(folder)}): its edits cannot be changed")
    with run_lock(folder):
        stream = stream_of(folder)
        stream.journal = str(journal_path(folder))
        stream.configure_model()
        assert stream.model is not None  # noqa: S101 - for the type checker
        cast_as(stream.model, precision_of(folder))
        stream.ledger.align()
        path = find_checkpoint(folder)
        session = stream.open(None if path is None else load_tree(path)["lit_edit"])
        yield ChangingRun(folder, stream, session)


@contextmanager
def open_as_of(folder: Path, edits: int) -> Iterator[ChangingRun]:
    """Open a run as it was after so many edits, in a folder that is gone afterwards; the run itself is not touched.

    The edits are replayed from the journal, without fitting anything. Where one step made several, all of them are.
    Edits are counted whether they hold still or not; :class:`RunError` if the run has not made so many.
    """
    folder = check_folder(folder).resolve()
    count = records_until(read_history(folder), Journal(journal_path(folder), writable=False).records, edits)
    with tempfile.TemporaryDirectory(prefix="lit-edit-") as made:
        shutil.copy(folder / "config.yaml", made)
        path = journal_path(Path(made))
        path.parent.mkdir(parents=True)
        Journal(journal_path(folder), writable=False).copy_to(Journal(path), count)
        with open_for_change(Path(made)) as run:
            yield run


def records_until(history: EditHistory, records: Sequence[Mapping[str, Any]], edits: int) -> int:
    """Return how many records of a journal lead to its first so many edits, with what came of them before the next."""
    if edits > len(history.made):
        raise RunError(f"the run has made {counted(len(history.made), 'edit')}, not {edits}")
    made = 0
    for index, record in enumerate(records):
        if made >= edits and record.get("entries"):
            return index
        made += len(record.get("entries", ()))
    return sum(record["kind"] != "end" for record in records)


def stream_of(folder: Path) -> EditStream:
    """Return the stream that a run's config describes."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(EditStream, "model")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of names that older versions of the parser have too
            stream = parser.instantiate_classes(parser.parse_object({"model": _read_config(folder)["model"]})).model
    except UserError:
        raise
    except Exception as error:  # a config that was changed by hand fails in many ways
        raise RunError(f"{folder}/config.yaml does not describe a run: {error}") from error
    assert isinstance(stream, EditStream)  # noqa: S101 - for the type checker
    return stream


def find_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint of a run that is whole, to the last bit, and fits its journal."""
    path = journal_path(folder)
    if not path.is_file():
        return None
    journal = Journal(path, writable=False)
    found: list[tuple[int, Path]] = []
    for checkpoint in {file.resolve() for file in (folder / "checkpoints").glob("*.ckpt") if file.is_file()}:
        try:
            ledger = load_tree(checkpoint, "meta")["lit_edit"]["ledger"]
            position, digest = ledger["position"], ledger["digest"]
        except (CheckpointError, KeyError, TypeError) as error:
            log.warning("%s is damaged and not used: %s", checkpoint, error)
            continue
        if position <= len(journal) and journal.digest(position) == digest:
            found.append((position, checkpoint))
    for _, checkpoint in sorted(found, reverse=True):  # the values only of those that would be used
        try:
            check_tree(checkpoint)
        except CheckpointError as error:
            log.warning("%s is damaged and not used, but the one before it or the journal: %s", checkpoint, error)
            continue
        return checkpoint
    return None
