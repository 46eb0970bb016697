"""The tables and the figure of ``study beliefs``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_edit.files.paths import without_nan
from lit_edit.files.pictures import COLOURS, add_panel, new_figure
from lit_edit.studies.beliefs.coherence import GAPS, KINDS, OBJECTS
from lit_edit.studies.frame import as_cell
from lit_edit.sweeps.outputs import as_markdown, write_outputs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIRST = ("before", "unedited")
ACCURACIES = {f"accuracy/{kind}": name for kind, name in KINDS.items()}
BY_KIND = {f"gap/{kind}": name for kind, name in KINDS.items()}
BY_OBJECT = {f"gap/{name}": name for name in OBJECTS}
LOGIC = {f"logic/{name}": text for name, text in GAPS.items()}
COLUMNS = ("p/requested", *ACCURACIES, *(f"gap/{kind}/{name}" for kind in KINDS for name in OBJECTS), *LOGIC)
"""What can be measured of a case."""


def write_report(folder: Path, settings: Mapping[str, Any]) -> str:
    """Write ``beliefs.md``, ``beliefs.csv``, ``beliefs.json`` and ``beliefs.png``; return the tables as Markdown."""
    from lit_edit.studies.beliefs.cases import cases_of

    rows = []
    for path in sorted((folder / "cases").glob("*.jsonl"), key=lambda path: (path.stem not in FIRST, path.stem)):
        cases = [row for case, row in sorted(cases_of(path).items()) if case < settings["edits"]]
        rows.append(mean_row(path.stem, cases))
    trained = settings["trained"]
    shape = settings["testbed"]["training"]["preset"]
    text = (
        f"# {folder.name}\n\nA model ({shape}) that says {trained['accuracy']:.1%} of {settings['facts']} facts after "
        f"{trained['steps']} steps. `before`: unedited, against the ideal reader before the edit; `unedited`: against "
        "the one behind it, as all others are. Means over edits, each on the unedited model.\n"
    )
    tables = {
        "Generation accuracy, by fact": ACCURACIES,
        "Probabilistic coherence, mean |p(model) - p(ideal reader)| over objects, by fact": BY_KIND,
        "The same by object": BY_OBJECT,
        "Logical coherence, mean distance of": LOGIC,
    }
    for heading, shown in tables.items() if rows else ():
        text += f"\n{heading}:\n\n{as_markdown([_cells(row, shown) for row in rows])}"
    text += "" if rows else "\nNo edit is measured yet.\n"
    for row in rows:
        if row["refused"]:
            text += f"\n{row['editor']}: {row['refused']} edits were refused and are measured as none.\n"
    content = without_nan({"study": folder.name, "settings": settings, "rows": rows})
    return write_outputs(folder, "beliefs", text, rows, draw_study(rows, folder.name) if rows else None, content)


def mean_row(editor: str, cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return means and standard deviations over cases.

    Example:
        >>> row = mean_row("d4s", [{"gap/edited/now": 0.25, "gap/edited/original": 0.75}, {"gap/edited/now": 0.75}])
        >>> row["gap/edited/now"], row["gap/edited"], row["edits"]
        (0.5, 0.625, 2)
    """
    row: dict[str, Any] = {"editor": editor, "edits": len(cases), "refused": sum("refused" in case for case in cases)}
    for name in COLUMNS:
        values = [float(case[name]) for case in cases if case.get(name) is not None]
        row[name] = statistics.fmean(values) if values else None
        row[f"{name} sd"] = statistics.stdev(values) if len(values) > 1 else None
    among = {kind: [f"gap/{kind}/{name}" for name in OBJECTS] for kind in KINDS}
    among |= {name: [f"gap/{kind}/{name}" for kind in KINDS] for name in OBJECTS}
    for name, parts in among.items():
        means = [row[part] for part in parts if row[part] is not None]
        row[f"gap/{name}"] = statistics.fmean(means) if means else None
    return row


def _cells(row: Mapping[str, Any], shown: Mapping[str, str]) -> dict[str, str]:
    return {head: as_cell(row[name]) for name, head in {"editor": "editor", "edits": "edits", **shown}.items()}


def draw_study(rows: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Draw accuracy, probabilistic and logical gaps as bars, a colour per editor."""
    figure = new_figure(13, 4.4, title)
    gaps = ("A is true", "A and B", "order", "A or B", "not A")
    kinds = ("edited", "dependent", "other subject,\nsame relation", "other subject\nand relation")
    panels = (
        ("Generation accuracy (more is better)", dict(zip(ACCURACIES, kinds, strict=True))),
        ("|p(model) - p(ideal reader)| (less is better)", dict(zip(BY_KIND, kinds, strict=True))),
        ("Logical gaps (less is better)", dict(zip(LOGIC, gaps, strict=True))),
    )
    width = 0.8 / len(rows)
    for place, (heading, names) in enumerate(panels, 1):
        axis = add_panel(figure, (1, 3, place), heading, heading, grid=False)
        for number, row in enumerate(rows):
            xs = [at + (number - (len(rows) - 1) / 2) * width for at in range(len(names))]
            heights = [0.0 if row[name] is None else row[name] for name in names]
            axis.bar(xs, heights, width, label=row["editor"], color=COLOURS[number % len(COLOURS)])
        axis.set_xticks(range(len(names)), list(names.values()), fontsize=8)
        if place == 1:
            axis.set_ylim(0, 1.03)
            shown = axis.get_legend_handles_labels()
            figure.legend(*shown, loc="outside upper right", ncols=len(rows), frameon=False, fontsize=9)
    return figure
