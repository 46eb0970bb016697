"""What stands in the README and the docs: links lead somewhere, every page can be reached, tables say a thing once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

LINK = re.compile(r"\]\(([^)\s]+)\)")
SKIPPED = {".git", "build", "dist", "node_modules", "runs"}
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for page in ROOT.rglob("*.md")
    if not SKIPPED & set(page.relative_to(ROOT).parts)
    and not any(p.startswith(".") for p in page.relative_to(ROOT).parts)
)


# Tables, by the head of their first column, in which it takes several cells to name a row.
NAMED_BY = {"task": 2, "P": 2, "embeddings begin with": 3}


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def links_of(page: str) -> list[tuple[Path, str]]:
    """Files that a page links to, and the heading meant in each (may be empty); addresses elsewhere are left out."""
    found = []
    for link in LINK.findall(re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)):
        if not re.match(r"[a-z]+:", link):
            name, _, anchor = link.partition("#")
            found.append(((ROOT / page).parent / name if name else ROOT / page, anchor))
    return found


def anchors_of(page: Path) -> set[str]:
    """Anchors of the headings, as they are made of them where the page is shown."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }


def doubled(page: str) -> list[tuple[int, str]]:
    """Rows whose name stands twice in one table of a page: the line of the table, the name.

    What names a row is its first cell, or as many as ``NAMED_BY`` says.
    """
    found = []
    for match in re.finditer(r"(?:^\|.*\n)+", text_of(page) + "\n", re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in row.strip().strip("|").split("|")] for row in match[0].splitlines()]
        width = 2 if head[:2] == ["editor", "step"] else NAMED_BY.get(head[0], 1)
        names = [", ".join(row[:width]) for row in rows if any(row[:width])]
        line = text_of(page)[: match.start()].count("\n") + 1
        found += [(line, name) for name in sorted(set(names)) if names.count(name) > 1]
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target, anchor in links_of(page):
        assert target.exists(), f"{page} links to {target}, which is not there"
        assert not anchor or anchor in anchors_of(target), f"{page} links to #{anchor} of {target}: no such heading"


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen: set[str] = set()
    left = ["README.md"]
    while left:
        page = left.pop()
        if page not in seen and page.endswith(".md"):
            seen.add(page)
            left += [target.resolve().relative_to(ROOT).as_posix() for target, _ in links_of(page)]
    assert not set(PAGES) - seen


@pytest.mark.parametrize("page", PAGES)
def test_no_row_stands_twice_in_a_table(page: str) -> None:
    assert not doubled(page)
