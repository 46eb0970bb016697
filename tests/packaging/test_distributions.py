"""What is packed is the tree: no package and no data file is missing from the wheel or the source distribution.

That what is packed also works, and needs nothing that ``pyproject.toml`` does not name, is what ``check_wheel.py``
says, which ``.ci/run`` runs outside the checkout.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT
from tests.packaging.lend import metadata_of
from tests.test_imports import MODULES, imports

FOLDERS = ("benchmarks", "callbacks", "configs", "docs", "lit_edit", "tests")
FILES = {
    *("pyproject.toml", "setup.cfg", "setup.py", "MANIFEST.in", "constraints.txt"),
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"),
}
HOMES = {"lit_edit": "lit_edit", "callbacks": "lit_edit/callbacks", "configs": "lit_edit/configs"}


def tree() -> set[str]:
    """All files that the repository is made of, but those that only git and the automatic checks read."""
    found = {path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()}
    return {str(p.relative_to(ROOT)) for p in found if "__pycache__" not in p.parts} | FILES


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree to build in, without what an earlier build may have left in the checkout."""
    folder = tmp_path_factory.mktemp("source")
    for name in tree():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


def built(source: Path, *options: str) -> set[Path]:
    """Build what the options ask for with the installed setuptools; nothing is fetched."""
    target = source.parent / f"dist{'-'.join(options)}"
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), *options, str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "absent from the `packages` configuration" not in done.stderr + done.stdout
    return set(target.iterdir())


@pytest.fixture(scope="module")
def packed(source: Path) -> tuple[Path, Path]:
    """The wheel, built from the source distribution, and that."""
    wheel, archive = sorted(built(source), key=lambda path: path.suffix == ".gz")
    return wheel, archive


def of_wheel(path: Path) -> set[str]:
    """The files of a wheel, without those that describe it."""
    with zipfile.ZipFile(path) as wheel:
        return {name for name in wheel.namelist() if ".dist-info/" not in name and not name.endswith("/")}


def test_wheel_and_source_distribution_hold_the_tree(source: Path, packed: tuple[Path, Path]) -> None:
    wheel, archive = packed
    with tarfile.open(archive) as files:
        names = {member.name.partition("/")[2] for member in files.getmembers() if member.isfile()}
    assert {name for name in names if ".egg-info/" not in name} == tree() | {"PKG-INFO"}

    expected = {
        f"{HOMES[folder]}/{rest}" for folder, _, rest in (name.partition("/") for name in tree()) if folder in HOMES
    }
    assert of_wheel(wheel) == expected
    (from_tree,) = built(source, "--wheel")
    assert of_wheel(from_tree) == expected


def test_packages_have_an_init() -> None:
    """Without one, ``pkgutil.walk_packages`` and tools that read packages do not see a folder's modules."""
    folders = {path.parent for home in HOMES for path in (ROOT / home).rglob("*.py")}
    assert not [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").is_file()]


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="no git, or no checkout")
def test_git_ignores_nothing_that_is_packed() -> None:
    """A pattern of ``.gitignore`` can hide a folder of the same name deeper in the tree from every other clone."""
    asked = ["git", "check-ignore", "--no-index", "--stdin"]
    ignored = subprocess.run(asked, cwd=ROOT, input="\n".join(sorted(tree())), capture_output=True, text=True)
    assert ignored.stdout.split() == []
    assert ignored.returncode == 1, ignored.stderr


def test_what_is_imported_is_required(packed: tuple[Path, Path]) -> None:
    """By name, not because something else happens to require it: that may end with its next release."""
    requirements = [Requirement(line) for line in metadata_of(packed[0]).requires or []]
    required = {canonicalize_name(r.name) for r in requirements if str(r.marker) != 'extra == "dev"'}
    providers = packages_distributions()
    imported = {name for module in MODULES for name in imports(module, typing=False) if name not in MODULES}
    imported -= {"lit_edit", *sys.stdlib_module_names}
    assert "torch" in imported
    missing = [n for n in imported if not required & {canonicalize_name(p) for p in providers.get(n, [n])}]
    assert not missing, f"imported, and not named in pyproject.toml: {', '.join(sorted(missing))}"
