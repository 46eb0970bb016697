"""What a session answers: what the models say, and what has become of the edits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """How the two models continue a prompt."""

    prompt: str
    base: str
    edited: str


class EditList(list[dict[str, Any]]):
    """Edits as dictionaries; printed, a table."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        super().__init__(rows)

    def __repr__(self) -> str:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table("#", "id", "prompt", "new object", "state", "says")
        for row in self:
            table.add_row(
                *(escape(str(row.get(k) or "")) for k in ("number", "id", "prompt", "wanted", "state", "said"))
            )
        console = Console(width=120)
        with console.capture() as captured:
            console.print(table)
        return captured.get().rstrip()
