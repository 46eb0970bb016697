"""docs/architecture.md is true: its names exist, its folders and floors are all there, its recipes work as written."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from lit_edit.cli.registry import BY_NAME
from tests.conftest import ROOT
from tests.test_imports import FLOORS, MODULES, tree

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

# ---- names --------------------------------------------------------------------------------------------------------


def names(page: str) -> list[str]:
    """What stands in backticks, outside blocks of code, and is one word: a path, a module, a class, a function."""
    prose = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    return sorted({name for name in re.findall(r"`([^`\n]+)`", prose) if re.fullmatch(r"[\w./]+", name)})


def defined() -> dict[str, str]:
    """All classes, functions, methods, attributes and constants of the library, with a module that has them."""
    found: dict[str, str] = {}
    for module in MODULES:
        for node in ast.walk(tree(module)):
            body = getattr(node, "body", None)
            for child in body if isinstance(body, list) else []:
                targets = getattr(child, "targets", None) or [getattr(child, "target", None)]
                own = [getattr(child, "name", None), *(getattr(target, "id", None) for target in targets)]
                found |= dict.fromkeys(filter(None, own), module)
    return found


DEFINED = defined()


def is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def exists(name: str) -> bool:
    if "/" in name or name.endswith((".py", ".md", ".yaml", ".toml")):
        return (ROOT / name).exists()
    if name.startswith("LIT_EDIT_"):  # read from the environment
        return name in (ROOT / "tests" / "conftest.py").read_text("utf-8")
    if name in DEFINED or name in BY_NAME or (ROOT / "lit_edit" / "editors" / name).is_dir():
        return True
    first, _, rest = name.rpartition(".")
    if not first:
        return any(hasattr(import_module(home), name) for home in ("builtins", "typing")) or is_module(name)
    if first in DEFINED:  # a class, whose method may be that of a class above it
        return hasattr(getattr(import_module(DEFINED[first]), first), rest)
    return is_module(name) or (is_module(first) and hasattr(import_module(first), rest))


@pytest.mark.parametrize("name", names(PAGE))
def test_names_of_the_page_exist(name: str) -> None:
    assert exists(name), f"docs/architecture.md names {name!r}, which is not there"


@pytest.mark.parametrize("name", names(CONTRIBUTING))
def test_names_of_contributing_exist(name: str) -> None:
    assert exists(name), f"CONTRIBUTING.md names {name!r}, which is not there"


@pytest.mark.parametrize(
    "name", ["lit_edit.nowhere", "lit_edit/nowhere.py", "EditStream.nothing", "no_such_function", "os.x"]
)
def test_names_that_do_not_exist_are_seen(name: str) -> None:
    assert not exists(name)


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text("utf-8"))
    here = [target for target in targets if "://" not in target]
    assert here
    assert not [target for target in here if not (ROOT / page).parent.joinpath(target).exists()]


# ---- folders and floors -------------------------------------------------------------------------------------------


def test_every_folder_has_one_sentence() -> None:
    rows = dict(re.findall(r"^\| `([\w/]+)/` \| (.+) \|$", PAGE, re.MULTILINE))
    packages = {f"lit_edit/{path.parent.name}" for path in (ROOT / "lit_edit").glob("*/__init__.py")}
    assert set(rows) == packages | {"callbacks", "configs", "tests", "benchmarks", "docs"}
    assert not [folder for folder, sentence in rows.items() if not re.fullmatch(r"[A-Z].*[^.]\.", sentence)]


def test_the_floors_of_the_page_are_those_that_are_tested() -> None:
    (block,) = re.findall(r"From the ground up:\n\n```text\n(.*?)```", PAGE, re.DOTALL)
    short = [", ".join(name.removeprefix("lit_edit.").removesuffix(".*") for name in floor) for floor in FLOORS]
    assert block.splitlines() == short[:-1]  # above all stands the package itself


# ---- recipes ------------------------------------------------------------------------------------------------------

RECIPES = {
    title: re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    for title, text in re.findall(
        r"^### (.+?)\n(.*?)(?=^##)", PAGE.partition("## Recipes")[2], re.DOTALL | re.MULTILINE
    )
}
MORE = {  # what the text beside a recipe says
    "A closed-form editor": f"""
import runpy
runpy.run_path({str(ROOT / "docs" / "make_editors.py")!r}, run_name="__main__")
from lit_edit.cli.main import main
assert main(["editors", "CautiousD4S"]) == 0
try:
    main(["fit", "--config", "quickstart", "--config", "method/cautious", "--print_config"])
except SystemExit as stop:
    assert stop.code == 0
"""
}
DRIVER = """
import json, sys, traceback
from pathlib import Path
import lit_edit
assert Path(lit_edit.__file__).is_relative_to(sys.argv[1]), lit_edit.__file__
found = {}
for title, code in json.loads(Path("recipes.json").read_text()).items():
    try:
        exec(compile(code, title, "exec"), {})
    except BaseException:
        found[title] = traceback.format_exc()
Path("found.json").write_text(json.dumps(found))
"""


def place(house: Path, path: str) -> Path:
    """Where a file of the repository stands in an installed library."""
    return house / (path if path.startswith("lit_edit/") else f"lit_edit/{path}")


def apply(house: Path, diff: str) -> None:
    """Change a file as a recipe says: lines that stay are found from the top down, others put in or taken out there."""
    (header, *changes) = diff.splitlines()
    file = place(house, header.removeprefix("+++ "))
    lines, at = file.read_text("utf-8").splitlines(), 0
    for sign, line in ((change[:1], change[1:]) for change in changes):
        if sign == "+":
            lines.insert(at, line)
            at += 1
        else:
            at = lines.index(line, at)
            if sign == "-":
                del lines[at]
            else:
                at += 1
    file.write_text("\n".join(lines) + "\n", "utf-8")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the library in which all recipes have been followed."""
    house = tmp_path_factory.mktemp("house")
    for folder in ("lit_edit", "callbacks", "configs"):
        shutil.copytree(ROOT / folder, place(house, folder) if folder != "lit_edit" else house / folder,
                        ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
    for blocks in RECIPES.values():
        for language, block in blocks:
            if language == "diff":
                apply(house, block)
            elif block.startswith("# "):
                header, _, content = block.partition("\n")
                file = place(house, header.removeprefix("# "))
                assert not file.exists(), f"{header}: there is one already"
                file.write_text(content, "utf-8")
    return house


@pytest.fixture(scope="module")
def tried(house: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong when each recipe's last block was run, by its title; all in one process, to import torch once."""
    folder = tmp_path_factory.mktemp("tried")
    last = {title: blocks[-1][1] + MORE.get(title, "") for title, blocks in RECIPES.items()}
    (folder / "recipes.json").write_text(json.dumps(last))
    environment = {**os.environ, "PYTHONPATH": str(house), "LIT_EDIT_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(house)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads((folder / "found.json").read_text())
    return found


def test_there_are_five_recipes_each_with_the_file_to_copy_from() -> None:
    kinds = ["A closed-form editor", "A transform", "A family", "A record format", "A callback"]
    assert list(RECIPES) == kinds
    for title in kinds:
        text = PAGE.partition(f"### {title}\n")[2].partition("\n```")[0]
        (copied,) = re.findall(r"Copy from `([\w/.]+)`", text)
        assert (ROOT / copied).is_file()


@pytest.mark.parametrize("title", RECIPES)
def test_recipe_works(title: str, tried: dict[str, str]) -> None:
    assert title not in tried, tried[title]


def test_what_recipes_write_is_in_this_repositorys_style(house: Path) -> None:
    for check in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *check, "--no-cache", "--config", str(ROOT / "pyproject.toml"), "."]
        done = subprocess.run(command, cwd=house, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
