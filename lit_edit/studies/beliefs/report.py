"""The tables and the figure of ``study beliefs``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_edit.files.paths import without_nan, write_atomically, write_json
from lit_edit.studies.beliefs.coherence import GAPS, KINDS, OBJECTS
from lit_edit.sweeps.comparison import COLOURS
from lit_edit.sweeps.gathering import as_csv, as_markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIRST = ("before", "unedited")


def write_report(folder: Path, settings: Mapping[str, Any]) -> str:
    """Write ``beliefs.md``, ``beliefs.csv``, ``beliefs.json`` and ``beliefs.png``.

    Args:
        folder: The study's.
        settings: What it is about.

    Returns:
        The tables as Markdown.
    """
    files = sorted((folder / "cases").glob("*.jsonl"), key=_order)
    rows = [mean_row(path.stem, _read(path, settings["edits"])) for path in files]
    trained = settings["trained"]
    shape = settings["testbed"]["training"]["preset"]
    text = (
        f"# {folder.name}\n\nA model ({shape}) that says {trained['accuracy']:.1%} of {settings['facts']} facts after "
        f"{trained['steps']} steps. `before`: unedited, against the ideal reader before the edit; `unedited`: against "
        "the one behind it, as all others are. Means over edits, each on the unedited model.\n"
    )
    if rows:
        text += f"\nGeneration accuracy, by fact:\n\n{as_markdown([_cells(row, _accuracies()) for row in rows])}"
        text += "\nProbabilistic coherence, mean |p(model) - p(ideal reader)| over objects, by fact:\n\n"
        text += as_markdown([_cells(row, {f"gap/{kind}": name for kind, name in KINDS.items()}) for row in rows])
        text += f"\nThe same by object:\n\n{as_markdown([_cells(row, _by_object()) for row in rows])}"
        text += f"\nLogical coherence, mean distance of:\n\n{as_markdown([_cells(row, _logic()) for row in rows])}"
    else:
        text += "\nNo edit is measured yet.\n"
    for row in rows:
        if row["refused"]:
            text += f"\n{row['editor']}: {row['refused']} edits were refused and are measured as none.\n"
    write_atomically(folder / "beliefs.md", lambda path: path.write_text(text, encoding="utf-8"))
    if rows:
        write_atomically(folder / "beliefs.csv", lambda path: path.write_text(as_csv(rows), encoding="utf-8"))
        figure = draw_study(rows, folder.name)
        write_atomically(folder / "beliefs.png", lambda path: figure.savefig(path, format="png", dpi=140))
    write_json(folder / "beliefs.json", without_nan({"study": folder.name, "settings": settings, "rows": rows}))
    return text


def _order(path: Path) -> tuple[int, str]:
    return (FIRST.index(path.stem) if path.stem in FIRST else len(FIRST), path.stem)


def _read(path: Path, edits: int) -> list[dict[str, Any]]:
    """Return the measurements of the first so many cases."""
    from lit_edit.studies.beliefs.cases import cases_of

    return [row for case, row in sorted(cases_of(path).items()) if case < edits]


def columns() -> list[str]:
    """Return the measurements that a case can have, in order."""
    return [
        "p/requested",
        *_accuracies(),
        *(f"gap/{kind}/{name}" for kind in KINDS for name in OBJECTS),
        *_logic(),
    ]


def mean_row(editor: str, cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return means and standard deviations over cases.

    Example:
        >>> row = mean_row("d4s", [{"gap/edited/now": 0.25, "gap/edited/original": 0.75}, {"gap/edited/now": 0.75}])
        >>> row["gap/edited/now"], row["gap/edited"], row["edits"]
        (0.5, 0.625, 2)
    """
    row: dict[str, Any] = {"editor": editor, "edits": len(cases), "refused": sum("refused" in case for case in cases)}
    for name in columns():
        values = [float(case[name]) for case in cases if case.get(name) is not None]
        row[name] = statistics.fmean(values) if values else None
        row[f"{name} sd"] = statistics.stdev(values) if len(values) > 1 else None
    for axis, names in (("kind", tuple(KINDS)), ("object", OBJECTS)):
        for name in names:
            place = 1 if axis == "kind" else 2
            means = [v for key, v in row.items() if _part(key, place) == name and v is not None]
            row[f"gap/{name}"] = statistics.fmean(means) if means else None
    return row


def _part(key: str, place: int) -> str | None:
    parts = key.split("/")
    return parts[place] if len(parts) == 3 and parts[0] == "gap" and not key.endswith(" sd") else None


def _accuracies() -> dict[str, str]:
    return {f"accuracy/{kind}": name for kind, name in KINDS.items()}


def _by_object() -> dict[str, str]:
    return {f"gap/{name}": name for name in OBJECTS}


def _logic() -> dict[str, str]:
    return {f"logic/{name}": text for name, text in GAPS.items()}


def _cells(row: Mapping[str, Any], shown: Mapping[str, str]) -> dict[str, str]:
    cells = {"editor": str(row["editor"]), "edits": str(row["edits"])}
    return cells | {head: "–" if row[name] is None else f"{row[name]:.3f}" for name, head in shown.items()}


def draw_study(rows: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Draw accuracy, probabilistic and logical gaps as bars, a colour per editor.

    Args:
        rows: Of :func:`mean_row`.
        title: Of the figure.
    """
    from matplotlib.figure import Figure  # not pyplot: no global state, no display needed

    figure = Figure(figsize=(13, 4.4), layout="constrained")
    kinds = dict(
        zip(KINDS, ("edited", "dependent", "other subject,\nsame relation", "other subject\nand relation"), strict=True)
    )
    logic = dict(zip(GAPS, ("A is true", "A and B", "order", "A or B", "not A"), strict=True))
    panels = (
        ("Generation accuracy (more is better)", {f"accuracy/{kind}": name for kind, name in kinds.items()}),
        ("|p(model) - p(ideal reader)| (less is better)", {f"gap/{kind}": name for kind, name in kinds.items()}),
        ("Logical gaps (less is better)", {f"logic/{gap}": name for gap, name in logic.items()}),
    )
    width = 0.8 / len(rows)
    for place, (heading, names) in enumerate(panels, 1):
        axis = figure.add_subplot(1, 3, place, gid=heading)
        axis.set_title(heading, fontsize=11, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        for number, row in enumerate(rows):
            xs = [at + (number - (len(rows) - 1) / 2) * width for at in range(len(names))]
            heights = [0.0 if row[name] is None else row[name] for name in names]
            axis.bar(xs, heights, width, label=row["editor"], color=COLOURS[number % len(COLOURS)])
        axis.set_xticks(range(len(names)), list(names.values()), fontsize=8)
        if place == 1:
            axis.set_ylim(0, 1.03)
            shown = axis.get_legend_handles_labels()
            figure.legend(*shown, loc="outside upper right", ncols=len(rows), frameon=False, fontsize=9)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure
