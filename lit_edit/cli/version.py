"""``version``: which one this is."""

from __future__ import annotations

import sys

from lit_edit.console.arguments import make_parser


def run_version(args: list[str]) -> None:
    """Print the version."""
    make_parser("version", "Print the version of lit-edit.").parse_args(args)

    from importlib.metadata import version

    sys.stdout.write(f"lit-edit {version('lit-edit')}\n")
