"""``undo``, ``redo`` and ``log``: a run's edits after the run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lit_edit.console.arguments import CommandParser, make_parser, positive
from lit_edit.console.terminal import write_json
from lit_edit.errors import ArgumentError, counted
from lit_edit.runs.reading import EditLog, read_history, read_log, say_if_cut

if TYPE_CHECKING:
    from lit_edit.ledger.history import EditHistory
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
    say_if_cut(options.run)
    numbers = _chosen(options, read_history(options.run), hold=True)

    from lit_edit.runs.folder import open_for_change

    with open_for_change(options.run) as run:
        editor = run.session.editor
        exact = options.exact or editor.exact_undo  # else: how far it is from a stream without the edits
        off = 0.0 if exact else editor.deviation(editor.retract(run.session.ledger.facts_of(numbers)))
        before = _answers(run, numbers)
        run.session.undo(numbers, exact=options.exact)
        later = any(entry.number > min(numbers) for entry in run.session.ledger.entries)
        note = ""
        if later and not off and not exact:
            note = (
                f"What {type(editor).__name__} had written for these is out. Later edits were made on a model that had "
                "them, and what they wrote stays as it is."
            )
        if off:
            note = (
                f"Later edits were made on a model that had these: without them their keys and residuals move by up to "
                f"{off:.1%}, so the weights may be off by about that share of the later edits' updates. undo --exact "
                "makes the later edits again; model.editor.init_args.keys=base makes undo exact from the start"
            )
        _finish(run, options, numbers, before, "taken out", note)


def run_redo(args: list[str]) -> None:
    """Put edits of a run that were taken out back."""
    parser = make_parser("redo", "Put edits of a run that were taken out back into its model.")
    _choose(parser, "were taken out")
    options = parser.parse_args(args)
    say_if_cut(options.run)
    numbers = _chosen(options, read_history(options.run), hold=False)

    from lit_edit.runs.folder import open_for_change

    with open_for_change(options.run) as run:
        before = _answers(run, numbers)
        note = (
            "The facts are back as they were recorded. Other edits were made, taken out or put back meanwhile: the "
            "weights are near those of before, not equal to them."
        )
        exact = run.session.editor.exact_undo or not _changed_since(run.session.ledger.journal.records, numbers)
        run.session.redo(numbers)
        _finish(run, options, numbers, before, "put back", "" if exact else note)


def run_log(args: list[str]) -> None:
    """List the edits of a run."""
    parser = make_parser(
        "log", "List the edits of a run, also while it runs: what was written, whether it holds, and if not, why."
    )
    parser.add_run()
    parser.add_argument("--subject", default=None, help="only edits of this subject")
    parser.add_argument("--last", type=positive, default=None, metavar="N", help="only the last N")
    parser.add_argument(
        "--failed",
        action="store_true",
        help="only edits that failed, with the likely reason; not those that were taken out",
    )
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    options = parser.parse_args(args)

    from rich.console import Console

    from lit_edit.runs.holding import explain, failures, headline, next_commands, to_tell
    from lit_edit.runs.names import shown as shown_folder

    say_if_cut(options.run)
    log = read_log(options.run)
    subject = None if options.subject is None else options.subject.casefold()
    wanted = [row["number"] for row in log.rows if subject in (None, row["subject"].casefold())]
    if not wanted and subject is not None and not options.json:
        raise ArgumentError(f"--subject {options.subject}: no edit of {options.run} has that subject")
    chosen = set(wanted[-options.last :] if options.last else wanted)
    all_of_them = options.subject is None and options.last is None  # of refused edits the subject is not known
    shown = [v for v in log.verdicts if v.number in chosen or (v.number is None and all_of_them)]
    shown = [verdict for verdict in shown if verdict.failed] if options.failed else shown
    if options.json:
        write_json([row for row in log.as_list() if (row["number"], row["id"]) in {(v.number, v.id) for v in shown}])
        return
    console = Console()
    if not options.failed:
        console.print(_table(log, {verdict.number for verdict in shown}))
    told = failures(shown) if options.failed else to_tell(shown)
    for line in (line for verdict in told for line in explain(verdict)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for line in (headline(log.verdicts), *next_commands(to_tell(log.verdicts), shown_folder(options.run))):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(log: EditLog, numbers: set[int | None]) -> Any:
    from lit_edit.console.tables import table_of

    rows = []
    for row, verdict in zip(log.rows, log.verdicts, strict=False):  # behind the edits made stand those refused
        if row["number"] in numbers:
            p, made = row.get("target_probability"), log.times.get(row["number"], "")[:19].replace("T", " ")
            about = (row["number"], row["id"], row["prompt"], row["target_new"])
            rows.append((*about, "" if p is None else f"{p:.2f}", made, verdict.state))
    return table_of((">#", "id", "prompt", "new object", ">p", "made", "state"), rows)


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
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def _chosen(options: argparse.Namespace, history: EditHistory, hold: bool) -> list[int]:
    """Return the numbers of the edits that were named; :class:`ArgumentError` if none were, or there are no such."""
    there = [e for e in history.made if (e.number not in history.undone) == hold]
    if not there and not options.edit:  # where edits are named by number, it is said what has become of each
        raise ArgumentError(f"there is nothing to {'undo' if hold else 'redo'}: {_there_are(0, hold)}")
    numbers = [number for text in options.edit for number in parse_numbers(text)]
    for name in options.id:
        numbers += _found([e.number for e in there if e.id == name], f"--id {name}")
    for subject in options.subject:
        same = [e.number for e in there if e.subject.casefold() == subject.strip().casefold()]
        numbers += _found(same, f"--subject {subject}")
    if options.last is not None:
        if not 1 <= options.last <= len(there):
            raise ArgumentError(f"--last {options.last}: {_there_are(len(there), hold)}")
        numbers += [entry.number for entry in there[-options.last :]]
    if not numbers:
        raise ArgumentError("name the edits: --edit, --id, --subject or --last (lit-edit log --run lists them)")
    chosen = sorted(set(numbers))
    history.check({"removed" if hold else "restored": chosen})
    return chosen


def _there_are(number: int, hold: bool) -> str:
    """Say of how many edits one can choose.

    Example:
        >>> _there_are(0, True), _there_are(1, False)
        ('no edit is in the model', '1 edit is taken out')
    """
    what = "in the model" if hold else "taken out"
    return f"no edit is {what}" if number == 0 else f"{counted(number, 'edit')} {'is' if number == 1 else 'are'} {what}"


def _found(numbers: list[int], what: str) -> list[int]:
    if not numbers:
        raise ArgumentError(f"{what}: there is no such edit (lit-edit log --run lists them)")
    return numbers


def parse_numbers(text: str) -> list[int]:
    """Read numbers and ranges.

    Example:
        >>> parse_numbers("3,5-7")
        [3, 5, 6, 7]
    """
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


def _changed_since(records: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> bool:
    """Tell whether other edits were made, taken out or put back since some were taken out."""
    out = {n: at for at, record in enumerate(records) for n in record.get("removed", ()) if n in numbers}
    since = records[min(out.values()) :]
    names = ("removed", "restored", "rewritten")
    return any(
        record.get("entries") or set().union(*(record.get(n, ()) for n in names)) - {*numbers} for record in since
    )


def _answers(run: ChangingRun, numbers: Sequence[int]) -> list[str]:
    from lit_edit.models.generation import continue_greedily

    entries = [run.session.ledger.history.entry(number) for number in numbers[:20]]
    return [continue_greedily(run.stream.adapter, run.stream.tokenizer, entry.prompt, 8) for entry in entries]


def _finish(
    run: ChangingRun, options: argparse.Namespace, numbers: Sequence[int], before: list[str], what: str, note: str
) -> None:
    """Write the run's files, measure, and show what has changed."""
    from rich.console import Console

    from lit_edit.console.tables import table_of
    from lit_edit.report import write_report
    from lit_edit.report.pictures import redraw
    from lit_edit.report.reading import read_run
    from lit_edit.runs.files import update_summary
    from lit_edit.runs.logged import update_metrics

    final = run.measure() if options.measure else None
    update_summary(run.folder, run.stream.ledger, final)
    update_metrics(run.folder, run.stream.ledger, final)
    run.write()  # last: a process that dies before is found out by it
    redraw(read_run(run.folder))
    if (run.folder / "report.html").is_file():
        write_report(run.folder)
    prompts = [run.session.ledger.history.entry(number).prompt for number in numbers]
    rows, there = list(zip(numbers, prompts, before, _answers(run, numbers), strict=False)), len(run.stream.ledger)
    names = ("number", "prompt", "before", "now")
    if options.json:
        answers = [dict(zip(names, row, strict=True)) for row in rows]
        write_json({"edits": list(numbers), "answers": answers, "in_model": there, "final": final, "note": note})
        return
    console = Console()
    title = f"{counted(len(numbers), 'edit')} {what}, {there} in the model"
    console.print(table_of(("#", *names[1:]), rows, title=title))
    if final is not None:
        kinds = (("efficacy", "success"), ("generalization", "success"), ("locality", "agreement"))
        told = [f"{kind} {name} {final[kind][name]:.3f}" for kind, name in kinds if final[kind].get(name) is not None]
        about = (
            f"measured over the {there} in the model: {', '.join(told)}" if told else "no edit is in the model any more"
        )
        console.print(about, highlight=False)
    if note:
        sys.stdout.write(f"{note}\n")
