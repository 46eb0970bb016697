"""Lends another environment what lit-edit requires, without its extras, by links: seconds instead of a second download.

    python tests/packaging/lend.py ENVIRONMENT

The other environment then holds what ``pip install`` of the wheel would bring, and nothing else: what the library
imports and ``pyproject.toml`` does not name is missing there. lit-edit itself is not lent.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def required(name: str) -> dict[str, Distribution]:
    """Return the installed distributions that one requires, directly or not, by name; itself is not among them."""
    found: dict[str, Distribution] = {}
    waiting, seen = [(canonicalize_name(name), "")], set()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue  # of an extra, or for another system; where it is needed, pip says so
        for line in found[name].requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                other = canonicalize_name(requirement.name)
                waiting += [(other, ""), *((other, wanted) for wanted in requirement.extras)]
    return dict(list(found.items())[1:])


def lend(environment: Path, name: str = "lit-edit") -> int:
    """Link what a distribution requires into an environment; return how many distributions that was."""
    paths = sysconfig.get_paths("venv", {"base": str(environment), "platbase": str(environment)})
    lent = required(name)
    for one in lent.values():
        for top in {file.parts[0] for file in one.files or []} - {"..", "__pycache__"}:
            link = Path(paths["purelib"], top)
            if not os.path.lexists(link):
                link.symlink_to(Path(str(one.locate_file(top))))
    return len(lent)


if __name__ == "__main__":
    sys.stdout.write(f"{lend(Path(sys.argv[1]).resolve())} packages lent to {sys.argv[1]}\n")
