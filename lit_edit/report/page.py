"""The page of one run."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lit_edit.errors import counted
from lit_edit.files.paths import write_text
from lit_edit.ledger.left_out import left_out
from lit_edit.report.curves import ages, charts_of, forgetting
from lit_edit.report.edits import STATES, changed_neighbours, edits_of, failures, taken_out
from lit_edit.report.figures import headlines, layer_rows, mapping_at, metric_rows
from lit_edit.report.protocols import ability_rows, protocol_charts, protocol_headlines, protocol_rows
from lit_edit.report.reading import RunRecord, read_run
from lit_edit.report.texts import as_growth, as_share, or_dash
from lit_edit.runs.holding import show_p

_TEMPLATES = Path(__file__).parent / "templates"
MOST_NEIGHBOURS = 1000
"""Neighbours on a page; all of them are in ``ledger/answers.jsonl``."""


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the page of a run from what its folder holds, by default into it as ``report.html``; return the file.

    Raises:
        ReportError: If there is no run.
    """
    run = read_run(folder)
    out = out or run.folder / "report.html"
    write_text(out, run_page(run))
    return out


def run_page(run: RunRecord) -> str:
    """Return a run's page."""
    edits = edits_of(run)
    changed, compared = changed_neighbours(run, edits)
    return render(
        "run.html",
        title=run.name,
        run=run,
        state=state_of(run),
        about=about(run),
        headlines=[*headlines(run), *protocol_headlines(run)],
        unfinished_at=run.summary.get("final_at"),
        metrics=[*metric_rows(run.summary), *protocol_rows(run.summary)],
        ability=ability_rows(run.summary),
        charts=[*charts_of(run), *protocol_charts(run)],
        forgetting=forgetting(edits),
        layers=layer_rows(run.summary),
        ages=ages(edits),
        edits=edits,
        states={name: count for name in STATES if (count := sum(edit.state == name for edit in edits))},
        failed=failures(edits),
        taken_out=taken_out(edits),
        left_out=left_out(run.records),
        changed=changed[:MOST_NEIGHBOURS],
        changed_count=len(changed),
        compared=compared,
        versions=mapping_at(run.notes, "versions"),
    )


def render(template: str, **context: Any) -> str:
    """Return a page; all text in it is escaped."""
    return _environment().get_template(template).render(**context)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = {"share": as_share, "growth": as_growth, "digits": "{:.5f}".format}
    environment.filters |= {"p": show_p, **{name: partial(or_dash, show) for name, show in shown.items()}}
    script = (_TEMPLATES / "script.js").read_text(encoding="utf-8")
    # The page may run this script and no other, whatever stands in its texts, and it may load nothing.
    environment.globals["script"] = script
    environment.globals["script_hash"] = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment


def state_of(run: RunRecord) -> dict[str, str]:
    """Return how far a run has come, in a word and a sentence."""
    made, asked = len(run.edits), run.notes.get("asked")
    there = sum(row["status"] == "holds" for row in run.edits)
    count = f"{counted(made, 'edit')} made, {there} in the model" if there < made else counted(made, "edit")
    handled = len(run.history.handled)
    if isinstance(asked, int) and handled < asked and not run.ended:
        count = f"{handled} of {counted(asked, 'edit')} dealt with"
    if run.summary.get("stale"):
        return {"word": "changed since", "tone": "fair", "text": f"{count}; {run.summary['stale']}"}
    if run.ended:
        return {"word": "finished", "tone": "good", "text": count}
    again = f"lit-edit fit --config {run.folder}/config.yaml --resume auto"
    return {"word": "not finished", "tone": "fair", "text": f"{count}; it goes on with {again}"}


def about(run: RunRecord) -> list[tuple[str, str]]:
    """Return what a run was of, in a few words each."""
    editor = str(run.setting("model.editor.class_path") or "").rpartition(".")[2]
    path = run.setting("data.path")
    data = Path(str(path)).name if path else run.setting("data.source")
    layers = [row["layer"].removeprefix("layer ") for row in layer_rows(run.summary)]
    made = sorted(run.times.values())
    rows = {
        "model": run.setting("model.language_model.name"),
        "editor": editor,
        "layers": ", ".join(layers),
        "data": data,
        "batch": run.setting("data.batch_size"),
        "seed": run.setting("seed_everything"),
        "device": run.notes.get("device"),
        "first edit": made[0][:16].replace("T", " ") if made else "",
    }
    return [(name, str(value)) for name, value in rows.items() if value not in (None, "")]


def flat(settings: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    """Yield settings by dotted name, as text.

    Example:
        >>> dict(flat({"a": {"b": 1}, "c": [1, {"d": None}]}))
        {'a.b': '1', 'c.0': '1', 'c.1.d': 'None'}
    """
    if isinstance(settings, Mapping):
        for name, value in settings.items():
            yield from flat(value, f"{prefix}{name}.")
    elif isinstance(settings, list):
        for index, value in enumerate(settings):
            yield from flat(value, f"{prefix}{index}.")
    else:
        yield prefix.removesuffix("."), str(settings)
