"""A run that begins with the edits of another."""

from __future__ import annotations

from pathlib import Path

from lit_edit.errors import ArgumentError
from lit_edit.files.paths import expand, sync_folder
from lit_edit.ledger.journal import Journal
from lit_edit.runs.files import journal_path
from lit_edit.runs.reading import read_history, say_if_cut


def check_source(source: Path, target: Path, overwrite: bool = False) -> None:
    """Check that a run can begin, or has begun, with the edits of another (if ``overwrite``, it is deleted first)."""
    read_history(source)
    source, target = expand(source).resolve(), target.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise ArgumentError(f"--continue {source}: a run cannot continue itself; choose another --run_name")
    path = journal_path(target)
    if overwrite or not path.is_file():
        return
    continued = [r["from"] for r in Journal(path, writable=False).records if r["kind"] == "continued"]
    if str(source) not in continued[-1:]:
        begun = f"with the edits of {continued[-1]}" if continued else "with none"
        raise ArgumentError(f"--continue {source}: {target} has begun already, {begun}; choose another --run_name")


def carry_over(source: Path, target: Path) -> int:
    """Begin a run's journal with the edits of another, whose ids are marked with its name; return how many hold."""
    say_if_cut(source)
    history, name = read_history(source), expand(source).resolve().name
    if journal_path(target).is_file() and len(Journal(journal_path(target))):
        raise ArgumentError(f"{target} has edits already; continue {source} in a new run")
    part = journal_path(target).with_suffix(".part")
    part.unlink(missing_ok=True)
    earlier, journal = Journal(journal_path(expand(source)), writable=False), Journal(part)
    for index, record in enumerate(earlier.records):
        if record["kind"] == "end":
            continue
        entries = [
            {**e, "id": f"{name}/{e['id']}", "request": {**e["request"], "id": f"{name}/{e['id']}"}}
            for e in record.get("entries", ())
        ]
        marked = {**record, **({"entries": entries} if entries else {})}
        if "ids" in record:  # of edits that were refused
            marked["ids"] = [f"{name}/{refused}" for refused in record["ids"]]
        journal.append(marked, earlier.tensors(index))
    journal.append({"kind": "continued", "from": str(expand(source).resolve()), "facts": False})
    part.replace(journal_path(target))  # whole, or not at all
    sync_folder(journal_path(target).parent)
    return len(history.live)
