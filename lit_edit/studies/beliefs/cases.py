"""The file of a study's cases: a line each, as they come."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_edit.files.changes import refuse_changes
from lit_edit.runs.results import append_line, read_lines


def cases_of(path: Path) -> dict[int, dict[str, Any]]:
    """Return the measurements of a file by case; a damaged line is named."""

    def read(line: Mapping[str, Any]) -> dict[str, Any]:
        return dict(line) if "settings" in line else {**line, "case": int(line["case"])}

    return {line["case"]: line for line in read_lines(path, read) if "case" in line}


class CaseFile:
    """Measurements of one editor, a JSON line per case, the editor's settings in the first.

    The file need not be there; one that was begun with other settings is refused.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings))
        lines = list(read_lines(path, dict))
        if lines:
            cure = "give the study another --name, or delete the file"
            refuse_changes(f"{path} was begun", lines[0].get("settings"), self.settings, cure)
        self.rows = cases_of(path)
        self.begun = bool(lines)

    def add(self, case: int, row: Mapping[str, Any]) -> None:
        """Put a case on file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.begun:
            append_line(self.path, {"settings": self.settings})
            self.begun = True
        self.rows[case] = {"case": case, **row}
        append_line(self.path, self.rows[case])
