"""Lends another environment what a wheel requires, without its extras, by links: seconds instead of a second download.

    python tests/packaging/lend.py WHEEL ENVIRONMENT

The other environment then holds what ``pip install WHEEL`` would bring, and nothing else: what the library imports and
``pyproject.toml`` does not name is missing there.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, PathDistribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def metadata_of(wheel: Path) -> Distribution:
    """Return what a wheel says of itself."""
    about = next(path for path in zipfile.Path(wheel).iterdir() if path.name.endswith(".dist-info"))
    return PathDistribution(about)  # type: ignore[arg-type]


def required(first: Distribution) -> dict[str, Distribution]:
    """Return the installed distributions that one requires, directly or not, by name."""
    found: dict[str, Distribution] = {}
    waiting, seen = [(first, "")], set()
    while waiting:
        one, extra = waiting.pop()
        for requirement in map(Requirement, one.requires or []):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
                continue
            name = canonicalize_name(requirement.name)
            try:
                found.setdefault(name, distribution(name))
            except PackageNotFoundError:
                continue  # pip says so where it is installed
            wanted = {(name, each) for each in ("", *requirement.extras)} - seen
            waiting += [(found[name], each) for _, each in wanted]
            seen |= wanted
    return found


def lend(wheel: Path, environment: Path) -> int:
    """Link what a wheel requires into an environment; return how many distributions that was."""
    site = sysconfig.get_path("purelib", "posix_prefix", {"base": str(environment)})
    lent = required(metadata_of(wheel))
    for one in lent.values():
        for top in {file.parts[0] for file in one.files or []} - {"..", "__pycache__"}:
            link = Path(site, top)
            if not os.path.lexists(link):
                link.symlink_to(Path(str(one.locate_file(top))))
    return len(lent)


if __name__ == "__main__":
    sys.stdout.write(f"{lend(Path(sys.argv[1]), Path(sys.argv[2]).resolve())} packages lent to {sys.argv[2]}\n")
