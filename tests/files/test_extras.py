"""Extras: every one is told of, and every import of what one brings names it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_edit.cli.eval_harness import import_lm_eval
from lit_edit.console.fit_parser import FitParser
from lit_edit.editors import AdaLoRA, LoRA
from lit_edit.errors import NotHereError
from lit_edit.files.extras import EXTRAS, import_extra

ROOT = Path(__file__).parents[2]


def extras() -> dict[str, str]:
    """By name, what pyproject.toml lists."""
    text = (ROOT / "pyproject.toml").read_text("utf-8").partition("[project.optional-dependencies]\n")[2]
    return dict(re.findall(r"(?ms)^(\w+) = \[(.*?)\]", text.partition("\n[")[0]))


def test_the_readme_has_every_extra_and_no_other() -> None:
    table = (ROOT / "README.md").read_text("utf-8").partition("| extra | what for |\n|---|---|\n")[2]
    told = re.findall(r"(?m)^\| `(\w+)` \| \S.*\|$", table.partition("\n\n")[0])
    assert sorted(told) == sorted(extras())


def test_every_package_comes_with_the_extra_that_is_named() -> None:
    assert sorted(EXTRAS.values()) == sorted(set(extras()) - {"dev"})
    for package, extra in EXTRAS.items():
        assert package.replace("_", "-") in extras()[extra]


def test_what_extras_bring_is_imported_in_one_way() -> None:
    """By no import statement: ``import_extra`` takes a string."""
    for path in [*ROOT.glob("lit_edit/**/*.py"), *ROOT.glob("callbacks/*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & set(EXTRAS), path


@pytest.mark.parametrize("package", EXTRAS)
def test_a_missing_package_is_named_with_its_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(NotHereError, match=rf'^it needs {package}, .*pip install "lit-edit\[{EXTRAS[package]}\]"'):
        import_extra(package, "it")


@pytest.mark.parametrize(("package", "use"), [("peft", LoRA), ("peft", AdaLoRA), ("lm_eval", import_lm_eval)])
def test_whoever_needs_one_says_so(package: str, use: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(NotHereError, match=rf'needs {package}.*pip install "lit-edit\[{EXTRAS[package]}\]"'):
        use()


def test_a_logger_that_cannot_be_had_is_refused_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(NotHereError, match=r'TensorBoardLogger .*pip install "lit-edit\[tensorboard\]"'):
        FitParser().parse(["--config", "quickstart", "--trainer.logger", "tensorboard"])


def test_the_package_is_imported_without_them() -> None:
    blocked = f"import sys; sys.modules.update(dict.fromkeys({list(EXTRAS)}))"
    code = f"{blocked}; import lit_edit.editors, lit_edit.callbacks, lit_edit.console.edit_cli"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
