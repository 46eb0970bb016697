"""``build``: make a data set that is not to be had as a file. A new one is a line in :data:`DATA_SETS`."""

from __future__ import annotations

import sys
from types import MappingProxyType

from lit_edit.console.arguments import make_parser
from lit_edit.console.parts import choose_part
from lit_edit.files.paths import expand
from lit_edit.studies.mqd.making import add_mqd_arguments, write_mqd

DATA_SETS = MappingProxyType(
    {
        "mqd": (
            "lit_edit.cli.build:build_mqd_files",
            "one set of questions in three kinds, from ATOMIC-style events",
        )
    }
)
"""By name: the function that takes the arguments behind it, and what the help says."""


def run_build(args: list[str]) -> None:
    """Make a data set."""
    build = choose_part("build", "Make a data set.", ("data set", "data sets"), DATA_SETS, args)
    if build is not None:
        build(args[1:])


def build_mqd_files(args: list[str]) -> None:
    """``build mqd``: write the three files of MQD."""
    parser = make_parser(
        "build mqd",
        "Make MQD, the Multi-Question Dataset: the same knowledge about everyday events asked by direct generation "
        "(mqd_direct.json), multiple choice (mqd_choice.json) and true or false (mqd_truth.json). The three files have "
        "the same events in the same order; lit-edit fit reads each with --data.source file --data.path FILE.",
    )
    add_mqd_arguments(parser)
    parser.add_limit("requests of each kind; by default all that the events allow", "--count")
    parser.add_out("where the files are written", required=True, metavar="FOLDER")
    options = parser.parse_args(args)

    from lit_edit.data.events import read_events
    from lit_edit.data.mqd import build_mqd

    made = build_mqd(read_events(options.events, options.split), options.limit, options.seed)
    paths = write_mqd(expand(options.out), made)
    for kind, requests in made.items():
        first = requests[0]
        sys.stdout.write(f"{paths[kind]}: {len(requests)} requests, the first:\n")
        sys.stdout.write("".join(f"    {line}\n" for line in f"{first.text} -> {first.target_new}".split("\n")))
