"""docs/reliability.md: every sentence that promises something names tests that are there."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import ROOT, script_of_docs


@cache
def maker() -> ModuleType:
    """Return docs/make_promises.py as a module."""
    return script_of_docs("make_promises")


@cache
def functions_of(path: Path) -> dict[str, ast.FunctionDef]:
    """Return the functions of a file by name, those of classes too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def can_fail(name: str, functions: dict[str, ast.FunctionDef], seen: frozenset[str] = frozenset()) -> bool:
    """Return whether a test asserts something, or asks for an error or a warning; itself, or a function it calls."""
    parts = list(ast.walk(functions[name]))
    called = {part.func.id for part in parts if isinstance(part, ast.Call) and isinstance(part.func, ast.Name)}
    asked = called | {part.attr for part in parts if isinstance(part, ast.Attribute)}
    return (
        any(isinstance(part, ast.Assert) for part in parts)
        or bool(asked & {"raises", "warns", "run_state_machine_as_test"})
        or any(can_fail(other, functions, seen | {name}) for other in called & set(functions) - seen - {name})
    )


def test_the_table_is_up_to_date() -> None:
    assert maker().PAGE.read_text(encoding="utf-8") == maker().page(), "make it anew: python docs/make_promises.py"


def test_every_sentence_is_a_promise_with_tests_or_explains() -> None:
    known = [row["says"] for row in maker().promises()["promises"]] + maker().promises()["explains"]
    said = maker().sentences(maker().body(maker().PAGE.read_text(encoding="utf-8")))
    assert [" ".join(sentence.split()) for sentence in said if sentence not in known] == [], "not in docs/promises.yaml"
    assert [sentence for sentence in known if sentence not in said] == [], "not on the page"
    assert len(set(known)) == len(known)


@pytest.mark.parametrize("name", sorted({test for row in maker().promises()["promises"] for test in row["held_by"]}))
def test_what_holds_a_promise_is_a_test_that_asserts(name: str) -> None:
    file, _, function = name.partition("::")
    functions = functions_of(ROOT / "tests" / file)
    assert function in functions, f"tests/{file} has no {function}"
    assert function.startswith("test_")
    assert can_fail(function, functions)


def test_sentences_are_told_apart() -> None:
    page = (
        "# A head\n\nOne here,\nand on. Two: `code`\n\n```bash\nNot. This.\n```\n\n- a point\n- another\n\n| a | b |\n"
    )
    assert maker().sentences(page) == ["One here, and on.", "Two:", "`code`", "a point", "another"]
