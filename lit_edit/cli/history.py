"""``undo``, ``redo`` and ``log``: a run's edits after the run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lit_edit.console.arguments import CommandParser, make_parser, positive

if TYPE_CHECKING:
    from lit_edit.ledger.history import EditHistory, LedgerEntry
    from lit_edit.runs.folder import ChangingRun


def run_undo(args: list[str]) -> None:
    """Take edits of a run out of its model."""
    parser = make_parser(
        "undo",
        "Take edits of a run out of its model again; ask, export and later runs then see it without them. The edits "
        "stay on record: redo puts them back.",
    )
    _choose(parser, "hold")
    parser.add_argument(
        "--exact",
        action="store_true",
        help="make all later edits again, as if these had never been; needed where the run's settings do not make undo "
        "exact by themselves (undo says so)",
    )
    options = parser.parse_args(args)

    from lit_edit.runs.folder import open_for_change
    from lit_edit.runs.reading import read_history

    numbers = _chosen(options, read_history(options.run), hold=True)
    with open_for_change(options.run) as run:
        editor = run.session.editor
        off = 0.0 if options.exact or editor.exact_undo else _how_far(run, numbers)
        before = _answers(run, numbers)
        run.session.undo(numbers, exact=options.exact)
        _finish(run, options, numbers, before, "taken out")
        later = any(entry.number > min(numbers) for entry in run.session.ledger.entries)
    if later and not off and not options.exact and not editor.exact_undo:
        sys.stdout.write(
            f"What {type(editor).__name__} had written for these is out. Later edits were made on a model that had "
            "them, and what they wrote stays as it is.\n"
        )
    if off:
        sys.stdout.write(
            f"Later edits were made on a model that had these: without them their keys and residuals move by up to "
            f"{off:.1%}, so the weights may be off by about that share of the later edits' updates. undo --exact makes "
            "the later edits again; model.editor.init_args.keys=base makes undo exact from the start\n"
        )


def run_redo(args: list[str]) -> None:
    """Put edits of a run that were taken out back."""
    parser = make_parser("redo", "Put edits of a run that were taken out back into its model.")
    _choose(parser, "were taken out")
    options = parser.parse_args(args)

    from lit_edit.runs.folder import open_for_change
    from lit_edit.runs.reading import read_history

    numbers = _chosen(options, read_history(options.run), hold=False)
    with open_for_change(options.run) as run:
        before = _answers(run, numbers)
        run.session.redo(numbers)
        _finish(run, options, numbers, before, "put back")
        if not run.session.editor.exact_undo:
            sys.stdout.write(
                "The facts are back as they were recorded. Where other edits were taken out or made again meanwhile, "
                "the weights are near those of before, not equal to them.\n"
            )


def run_log(args: list[str]) -> None:
    """List the edits of a run."""
    parser = make_parser("log", "List the edits of a run, also while it runs: what was written, and whether it holds.")
    parser.add_run()
    parser.add_argument("--subject", default=None, help="only edits of this subject")
    parser.add_argument("--last", type=positive, default=None, metavar="N", help="only the last N")
    parser.add_argument("--json", action="store_true", help="a JSON object per line instead of a table")
    options = parser.parse_args(args)

    import json

    from rich.console import Console

    from lit_edit.files.paths import without_nan
    from lit_edit.ledger.journal import Journal
    from lit_edit.runs.files import edit_rows, journal_path
    from lit_edit.runs.reading import read_history

    history = read_history(options.run)
    entries = [e for e in history.made if options.subject is None or e.subject.casefold() == options.subject.casefold()]
    entries = entries[-options.last :] if options.last else entries
    if options.json:
        numbers = {entry.number for entry in entries}
        for row in without_nan(edit_rows(history, {})):
            if row["number"] in numbers:
                sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
        return
    records = Journal(journal_path(options.run.expanduser()), writable=False).records
    times = {entry["number"]: record["time"] for record in records for entry in record.get("entries", ())}
    console = Console()
    console.print(_table(history, entries, times))
    for name, reason in history.refused:
        console.print(f"not made: {name}: {reason}", markup=False, highlight=False)
    console.print(f"{len(history.made)} edits made, {len(history.live)} hold", highlight=False)


def _table(history: EditHistory, entries: Sequence[LedgerEntry], times: dict[int, str]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for column in ("#", "id", "prompt", "new object", "p", "made", "state"):
        table.add_column(column, justify="right" if column in ("#", "p") else "left", overflow="fold")
    for entry in entries:
        probability = entry.facts.get("target_probability")
        table.add_row(
            str(entry.number),
            escape(entry.id),
            escape(entry.prompt),
            escape(entry.target_new),
            "" if probability is None else f"{probability:.2f}",
            times.get(entry.number, "")[:19].replace("T", " "),
            escape(history.undone.get(entry.number, "holds")),
        )
    return table


def _choose(parser: CommandParser, which: str) -> None:
    parser.add_run()
    parser.add_argument(
        "--edit",
        action="append",
        default=[],
        metavar="NUMBERS",
        help="numbers as lit-edit log shows them: 17, or 3,5,9 or a range 20-25; may be given several times",
    )
    parser.add_argument("--id", action="append", default=[], help="an edit by the id it has in the data; several times")
    parser.add_argument("--subject", action="append", default=[], help=f"all edits of a subject that {which}")
    parser.add_argument("--last", type=int, default=None, metavar="N", help=f"the last N edits that {which}")
    parser.add_argument(
        "--no-measure",
        dest="measure",
        action="store_false",
        help="do not measure the model again (summary.json then says that it is of an earlier state)",
    )


def _chosen(options: argparse.Namespace, history: EditHistory, hold: bool) -> list[int]:
    """Return the numbers of the edits that were named.

    Raises:
        ArgumentError: If none were, or there are no such edits.
    """
    from lit_edit.errors import ArgumentError

    there = [e for e in history.made if (e.number not in history.undone) == hold]
    numbers = [number for text in options.edit for number in parse_numbers(text)]
    for name in options.id:
        numbers += _found([e.number for e in there if e.id == name], f"--id {name}")
    for subject in options.subject:
        same = [e.number for e in there if e.subject.casefold() == subject.strip().casefold()]
        numbers += _found(same, f"--subject {subject}")
    if options.last is not None:
        if not 1 <= options.last <= len(there):
            raise ArgumentError(f"--last {options.last}: there are {len(there)} such edits")
        numbers += [entry.number for entry in there[-options.last :]]
    if not numbers:
        raise ArgumentError("name the edits: --edit, --id, --subject or --last (lit-edit log --run lists them)")
    chosen = sorted(set(numbers))
    history.check({"removed" if hold else "restored": chosen})
    return chosen


def _found(numbers: list[int], what: str) -> list[int]:
    from lit_edit.errors import ArgumentError

    if not numbers:
        raise ArgumentError(f"{what}: there is no such edit (lit-edit log --run lists them)")
    return numbers


def parse_numbers(text: str) -> list[int]:
    """Read numbers and ranges.

    Example:
        >>> parse_numbers("3,5-7")
        [3, 5, 6, 7]
    """
    from lit_edit.errors import ArgumentError

    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ArgumentError(f"--edit {text}: expected numbers like 17, 3,5,9 or 20-25")
        found = range(int(first), int(last or first) + 1)
        if len(numbers) + found.stop - found.start > 10_000_000:
            raise ArgumentError(f"--edit {text}: too many numbers")
        numbers += found
    return numbers


def _how_far(run: ChangingRun, numbers: Sequence[int]) -> float:
    """Estimate how far an undo is from a stream without the edits."""
    editor, ledger = run.session.editor, run.session.ledger
    return editor.deviation(editor.retract(ledger.facts_of(numbers)))


def _answers(run: ChangingRun, numbers: Sequence[int]) -> list[str]:
    from lit_edit.models.generation import continue_greedily

    entries = [run.session.ledger.history.entry(number) for number in numbers[:20]]
    return [continue_greedily(run.stream.adapter, run.stream.tokenizer, entry.prompt, 8) for entry in entries]


def _finish(
    run: ChangingRun, options: argparse.Namespace, numbers: Sequence[int], before: list[str], what: str
) -> None:
    """Write the run's files, measure, and show what has changed."""
    from rich.console import Console

    from lit_edit.console.tables import table_of
    from lit_edit.report import write_report
    from lit_edit.runs.files import update_summary

    final = run.measure() if options.measure else None
    update_summary(run.folder, run.stream.ledger, final)
    run.write()  # last: a process that dies before is found out by it
    if (run.folder / "report.html").is_file():
        write_report(run.folder)
    rows = [
        (number, run.session.ledger.history.entry(number).prompt, old, new)
        for number, old, new in zip(numbers, before, _answers(run, numbers), strict=False)
    ]
    console = Console()
    title = f"{len(numbers)} edits {what}, {len(run.stream.ledger)} hold"
    console.print(table_of(("#", "prompt", "before", "now"), rows, title=title))
    if final is not None:
        kinds = (("efficacy", "success"), ("generalization", "success"), ("locality", "agreement"))
        told = [f"{kind} {name} {final[kind][name]:.3f}" for kind, name in kinds if final[kind].get(name) is not None]
        console.print(f"measured over the {len(run.stream.ledger)} that hold: {', '.join(told)}", highlight=False)
