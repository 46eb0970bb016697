"""``lit-edit ability``: few-shot tasks on the model of a run, as it was after any number of its edits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lit_edit.console.arguments import make_parser
from lit_edit.errors import ArgumentError
from lit_edit.files.paths import expand
from lit_edit.runs.ability import Asked, Point, measure_run

if TYPE_CHECKING:
    from rich.table import Table

log = logging.getLogger(__name__)


def run_ability(args: list[str]) -> None:
    """Measure, print a table, and write ``ability.json`` into a folder of the run."""
    from lit_edit.ability.tasks import RESERVED, all_tasks

    parser = make_parser(
        "ability",
        "Measure few-shot tasks on the model of a run, as it was after any number of its edits: nothing is edited "
        "again. What is measured already is not measured again.",
    )
    parser.add_run()
    parser.add_argument(
        "--tasks", nargs="+", choices=all_tasks(), default=[*all_tasks()], help="by default all of them"
    )
    parser.add_task_files("by default they come from the hub", "--folder")
    parser.add_argument(
        "--at", nargs="+", type=int, default=None, help="numbers of edits; by default 0 and all of them"
    )
    parser.add_argument(
        "--shots", type=int, default=0, help=f"answered items in front of each question, 0 to {RESERVED}"
    )
    parser.add_limit("items of each task (100 tell about ten points); 0 for all", type=int, default=100)
    parser.add_argument("--likelihood", action="store_true", help="the likeliest option alone, not what the model says")
    parser.add_out("folder of the results; by default RUN/ability")
    options = parser.parse_args(args)
    if not 0 <= options.shots <= RESERVED:
        raise ArgumentError(f"--shots must be 0 to {RESERVED}, the items that are kept for it, got {options.shots}")
    if options.limit < 0:
        raise ArgumentError(f"--limit must be at least 0, got {options.limit}")
    if options.task_files is not None and not options.task_files.is_dir():
        raise ArgumentError(f"--task_files {options.task_files}: there is no such folder")
    asked = Asked(tuple(options.tasks), options.task_files, options.shots, options.limit, not options.likelihood)

    from lit_edit.console.tables import print_whole
    from lit_edit.runs.reading import read_history, say_if_cut

    made = len(read_history(options.run).made)
    say_if_cut(options.run)
    numbers = sorted({0, made} if options.at is None else set(options.at))
    out = options.out or expand(options.run) / "ability"
    history = measure_run(options.run, numbers, asked, out)
    print_whole(ability_table(history))
    log.info("written to %s", out / "ability.json")


def ability_table(history: Sequence[Point]) -> Table:
    """Return accuracies by task and number of edits, and the change from the first to the last with its interval."""
    from lit_edit.ability.course import summarise_ability
    from lit_edit.console.tables import table_of

    changes = summarise_ability(history)["change"]
    headings = ["task", *(f">after {point['edits']}" if point["edits"] else ">before" for point in history)]
    headings += [">change, 95 %"] if len(history) > 1 else []
    rows = []
    for task in history[0]["tasks"]:
        cells = [f"{point['tasks'][task]['likelihood']['accuracy']:.3f}" for point in history]
        if len(history) > 1:
            found = changes[task]["likelihood"]
            cells.append(f"{found['accuracy']:+.3f} ({found['accuracy_low']:+.3f} to {found['accuracy_high']:+.3f})")
        rows.append((task, *cells))
    return table_of(headings, rows, whole=True, title="accuracy of the likeliest option")
