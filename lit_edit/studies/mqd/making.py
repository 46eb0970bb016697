"""The files of MQD, and the options that say how they are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lit_edit.console.arguments import CommandParser
from lit_edit.files.paths import write_json

if TYPE_CHECKING:
    from lit_edit.data.request import EditRequest


def add_mqd_arguments(parser: CommandParser) -> None:
    """Add what says which events MQD is made of, and how."""
    text = (
        "tuples in ATOMIC's form: a file with tabs between head, relation and tail, or the id (owner/name) of a "
        "hub data set with these columns; by default the events that ship"
    )
    parser.add_data(text, "--events", dest="events", metavar="FILE|ID")
    parser.add_argument("--split", default="train", help="split of the hub data set")
    parser.add_seed("seed of order, wrong answers, and places of right ones")


def write_mqd(folder: Path, made: Mapping[str, Sequence[EditRequest]]) -> dict[str, Path]:
    """Write the files of MQD; return them by kind."""
    paths = {kind: folder / f"mqd_{kind}.json" for kind in made}
    for kind, requests in made.items():
        write_json(paths[kind], [request.as_dict() for request in requests])
    return paths
