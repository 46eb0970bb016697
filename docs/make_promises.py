"""Makes the table at the end of docs/reliability.md from docs/promises.yaml: ``python docs/make_promises.py``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

PAGE = Path(__file__).parent / "reliability.md"
PROMISES = Path(__file__).parent / "promises.yaml"
HEADING = "## What holds each promise"
INTRODUCTION = (
    "Every sentence above that promises something, by its first words, and tests that fail if it is broken\n"
    "(`pytest tests/FILE::NAME`). The table is made by `python docs/make_promises.py`, and a test compares it."
)


def promises() -> dict[str, Any]:
    """Return what the page promises and what it explains, as ``docs/promises.yaml`` has it."""
    return yaml.safe_load(PROMISES.read_text(encoding="utf-8"))  # type: ignore[no-any-return] # by the test


def sentences(text: str) -> list[str]:
    """Return the sentences of a page, in order, on one line each: of paragraphs and lists, not of tables and code."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n|\n(?=- |\d\. )", text))
    kept = (re.sub(r"^(- |\d\. )", "", block) for block in blocks if block and block[0] not in "#|!")
    return [sentence for block in kept for sentence in re.split(r"(?<=[.:?!])\s+(?=[A-Z`*])", block) if sentence]


def body(page: str) -> str:
    """Return a page without the table."""
    return page.partition(HEADING)[0].rstrip() + "\n"


def first_words(sentence: str, count: int = 9) -> str:
    """Return how a sentence begins, as a cell of a table holds it."""
    words = re.sub(r"\]\([^)]*\)", "", sentence.replace("[", "")).split()
    return " ".join(words[:count]).rstrip(",;:").replace("|", r"\|") + (" …" if len(words) > count else "")


def page() -> str:
    """Return the page with its table anew."""
    rows = [
        f"| {first_words(row['says'])} | {', '.join(f'`{test}`' for test in row['held_by'])} |"
        for row in promises()["promises"]
    ]
    table = "\n".join(["| promise | tests |", "|---|---|", *rows])
    return f"{body(PAGE.read_text(encoding='utf-8'))}\n{HEADING}\n\n{INTRODUCTION}\n\n{table}\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
