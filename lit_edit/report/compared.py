"""The page of several runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_edit.report.charts import Chart, Series, as_growth, as_plain, as_share, draw
from lit_edit.report.curves import SHARES, course, growth
from lit_edit.report.edits import Edit, edits_of
from lit_edit.report.figures import layer_rows, signed, value_at
from lit_edit.report.page import about, flat, render, state_of, write_page
from lit_edit.report.protocols import protocol_numbers
from lit_edit.report.reading import ReportError, RunRecord, read_run

NUMBERS = (  # row, place in the summary, and whether more is better
    ("efficacy success", ("final", "efficacy", "success"), True),
    ("efficacy accuracy", ("final", "efficacy", "accuracy"), True),
    ("efficacy accuracy at the edit", ("immediate", "efficacy", "accuracy"), True),
    ("generalization success", ("final", "generalization", "success"), True),
    ("generalization accuracy", ("final", "generalization", "accuracy"), True),
    ("locality success", ("final", "locality", "success"), True),
    ("neighbours as before", ("final", "locality", "agreement"), True),
    ("score", ("final", "score"), True),
)
CHARTS = (
    ("Efficacy: preferred", "efficacy/success"),
    ("Efficacy: first choice", "efficacy/accuracy"),
    ("Generalization: preferred", "generalization/success"),
    ("Neighbours as before", "locality/agreement"),
)
MOST_SETTINGS = 200
WRITTEN_BY_RUNS = ("run_name", "runs_dir", "trainer.default_root_dir", "overwrite", "resume", "ckpt_path")


@dataclass(frozen=True)
class Cell:
    """A number of a run, and whether it is the best of its row."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Facts:
    """One fact in all runs: which of them made it hold."""

    prompt: str
    wanted: str
    edits: tuple[Edit | None, ...]


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write a page that shows runs side by side.

    Args:
        folders: Of the runs.
        out: The file.

    Raises:
        ReportError: If one of them is no run, or they are fewer than two.
    """
    if len(folders) < 2:
        raise ReportError(f"a comparison needs two runs or more, got {len(folders)}")
    runs = [read_run(folder) for folder in folders]
    edits = [edits_of(run) for run in runs]
    differing = facts_that_differ(edits)
    page = render(
        "compared.html",
        title=f"{len(runs)} runs",
        names=names_of(runs),
        runs=runs,
        states=[state_of(run) for run in runs],
        abouts=[about(run) for run in runs],
        numbers=number_rows(runs),
        charts=charts_of(runs),
        settings=settings_that_differ(runs)[:MOST_SETTINGS],
        facts=differing,
        shared=len(set.intersection(*({(e.prompt, e.wanted) for e in one} for one in edits))),
    )
    return write_page(out, page)


def names_of(runs: Sequence[RunRecord]) -> list[str]:
    """Return a name for each run; of those with one name the paths."""
    names = [run.name for run in runs]
    return [str(run.folder) if names.count(run.name) > 1 else run.name for run in runs]


def number_rows(runs: Sequence[RunRecord]) -> list[tuple[str, list[Cell]]]:
    """Return the rows of the table of numbers: a cell per run."""
    rows = [("edits made", [Cell(str(len(run.edits))) for run in runs])]
    for name, place, _ in NUMBERS:
        values = [value_at(run.summary, *place) for run in runs]
        if any(value is not None for value in values):
            rows.append((name, _cells(values, [None if v is None else as_share(v) for v in values], more=True)))
    perplexity = [
        (value_at(run.summary, "base", "perplexity"), value_at(run.summary, "final", "perplexity")) for run in runs
    ]
    if any(after is not None for _, after in perplexity):
        changes = [None if not base or after is None else after / base - 1 for base, after in perplexity]
        texts = [
            None
            if after is None
            else as_plain(after) + ("" if change is None else f" ({signed(as_share(change), change)})")
            for (_, after), change in zip(perplexity, changes, strict=True)
        ]
        rows.append(("perplexity", _cells([after for _, after in perplexity], texts, more=False)))
    most = [_largest_growth(run) for run in runs]
    if any(value is not None for value in most):
        texts = [None if value is None else signed(f"{100 * value:.2f}%", value) for value in most]
        sizes = [None if value is None else abs(value) for value in most]
        rows.append(("change of mean |W|, at most", _cells(sizes, texts, more=False)))
    rows += _protocol_rows(runs)
    seconds = [value_at(run.summary, "seconds", "per_edit") for run in runs]
    if any(value is not None for value in seconds):
        rows.append(("seconds per edit", _cells(seconds, [None if v is None else f"{v:.2f}" for v in seconds], False)))
    return rows


def _largest_growth(run: RunRecord) -> float | None:
    found: list[float] = [row["growth"] for row in layer_rows(run.summary) if row["growth"] is not None]
    return max(found, key=abs, default=None)


def _protocol_rows(runs: Sequence[RunRecord]) -> list[tuple[str, list[Cell]]]:
    """Return a row per number of the longer protocols that any of the runs has measured."""
    found = [protocol_numbers(run.summary) for run in runs]
    rows = []
    for name in dict.fromkeys(name for numbers in found for name in numbers):
        values = [numbers.get(name) for numbers in found]
        share = next(numbers[name].share for numbers in found if name in numbers)
        texts = [None if v is None else (as_share if share else as_plain)(v.value) for v in values]
        more = not name.startswith("me perplexity")
        rows.append((name, _cells([None if v is None else v.value for v in values], texts, more)))
    return rows


def _cells(values: Sequence[float | None], texts: Sequence[str | None], more: bool) -> list[Cell]:
    known = [text for text in texts if text is not None]
    there = [value for value in values if value is not None]
    best = (max(there) if more else min(there)) if len(set(known)) > 1 else None
    chosen = {text for text, value in zip(texts, values, strict=True) if value is not None and value == best}
    return [Cell("–" if text is None else text, text in chosen) for text in texts]


def charts_of(runs: Sequence[RunRecord]) -> list[Chart]:
    """Return the charts, with a line per run."""
    names = names_of(runs)
    found = [
        draw(
            title,
            [Series(name, course(run, quantity)) for name, run in zip(names, runs, strict=True)],
            show=as_share,
            limits=SHARES,
            nested=True,
        )
        for title, quantity in CHARTS
    ]
    perplexity = [Series(name, course(run, "perplexity")) for name, run in zip(names, runs, strict=True)]
    found.append(draw("Perplexity of ordinary text", perplexity, nested=True))
    widest = [Series(name, _most(run)) for name, run in zip(names, runs, strict=True)]
    note = "Of the layer that has grown the most so far."
    found.append(draw("Growth of mean |W|", widest, show=as_growth, least=0.0, note=note, nested=True))
    return [chart for chart in found if chart is not None]


def _most(run: RunRecord) -> list[tuple[float, float]]:
    most: dict[float, float] = {}
    for points in growth(run).values():
        for edits, value in points:
            most[edits] = max(most.get(edits, value), value)
    return sorted(most.items())


def settings_that_differ(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Return the settings that are not the same in all runs, but for names and folders that cannot be."""
    all_settings = [{name: value for name, value in flat(run.config) if not _is_own(name, value, run)} for run in runs]
    names = dict.fromkeys(name for settings in all_settings for name in settings)
    rows = [(name, [settings.get(name, "–") for settings in all_settings]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _is_own(name: str, value: str, run: RunRecord) -> bool:
    """Tell whether a setting says no more than where a run is."""
    return name in WRITTEN_BY_RUNS or name.endswith(("save_dir", "dirpath")) or value == str(run.folder.resolve())


def facts_that_differ(edits: Sequence[Sequence[Edit]]) -> list[Facts]:
    """Return the facts that were edited in two runs or more and have come out differently, in order."""
    tables = [{(edit.prompt, edit.wanted): edit for edit in one} for one in edits]
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = [Facts(*key, tuple(table.get(key) for table in tables)) for key in keys]
    there = [(row, {edit.state for edit in row.edits if edit}) for row in rows if sum(map(bool, row.edits)) > 1]
    return [row for row, states in there if len(states) > 1]
