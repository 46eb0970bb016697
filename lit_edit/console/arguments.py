"""What the tools' argument parsers have in common."""

from __future__ import annotations

import argparse


def make_parser(command: str, description: str) -> argparse.ArgumentParser:
    """Return the parser of ``lit-edit COMMAND``; its help shows defaults."""
    return argparse.ArgumentParser(
        prog=f"lit-edit {command}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
