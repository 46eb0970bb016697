"""The page of several runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from lit_edit.errors import counted
from lit_edit.files.paths import write_text
from lit_edit.report.charts import Chart, Series, draw, draw_shares
from lit_edit.report.curves import course, growth
from lit_edit.report.edits import Edit, edits_of
from lit_edit.report.figures import end_and_base, most_grown, value_at
from lit_edit.report.page import about, flat, render, state_of
from lit_edit.report.protocols import protocol_numbers
from lit_edit.report.reading import ReportError, RunRecord, read_run
from lit_edit.report.texts import as_growth, as_plain, as_share, or_dash

NUMBERS = (  # row, and place in the summary; more is better
    ("efficacy success", ("final", "efficacy", "success")),
    ("efficacy accuracy", ("final", "efficacy", "accuracy")),
    ("efficacy accuracy at the edit", ("immediate", "efficacy", "accuracy")),
    ("generalization success", ("final", "generalization", "success")),
    ("generalization accuracy", ("final", "generalization", "accuracy")),
    ("locality success", ("final", "locality", "success")),
    ("neighbours as before", ("final", "locality", "agreement")),
    ("score", ("final", "score")),
)
CHARTS = (
    ("Efficacy: preferred", "efficacy/success"),
    ("Efficacy: first choice", "efficacy/accuracy"),
    ("Generalization: preferred", "generalization/success"),
    ("Neighbours as before", "locality/agreement"),
)
MOST_SETTINGS = 200
WRITTEN_BY_RUNS = ("run_name", "runs_dir", "trainer.default_root_dir", "overwrite", "resume", "ckpt_path")


class Cell(NamedTuple):
    """A number of a run, and whether it is the best of its row."""

    text: str
    best: bool = False


class Facts(NamedTuple):
    """One fact in all runs: which of them made it hold."""

    prompt: str
    wanted: str
    edits: tuple[Edit | None, ...]


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write a page that shows runs, by their folders, side by side; return it.

    Raises:
        ReportError: If one of them is no run, or they are fewer than two.
    """
    if len(folders) < 2:
        raise ReportError(f"a comparison needs two runs or more, got {len(folders)}")
    runs = [read_run(folder) for folder in folders]
    edits = [edits_of(run) for run in runs]
    shared = len(set.intersection(*({(e.prompt, e.wanted) for e in one} for one in edits)))
    page = render(
        "compared.html",
        title=counted(len(runs), "run"),
        names=names_of(runs),
        runs=runs,
        states=[state_of(run) for run in runs],
        abouts=[about(run) for run in runs],
        numbers=number_rows(runs, ranked=shared > 0),
        charts=charts_of(runs),
        settings=settings_that_differ(runs)[:MOST_SETTINGS],
        facts=facts_that_differ(edits),
        shared=shared,
    )
    write_text(out, page)
    return out


def names_of(runs: Sequence[RunRecord]) -> list[str]:
    """Return a name for each run; of those with one name the paths."""
    names = [run.name for run in runs]
    return [str(run.folder) if names.count(run.name) > 1 else run.name for run in runs]


def number_rows(runs: Sequence[RunRecord], ranked: bool = True) -> list[tuple[str, list[Cell]]]:
    """Return the rows of the table of numbers: a cell per run; none is the best of runs that share no edit."""
    rows = [("edits made", [Cell(str(len(run.edits))) for run in runs])]

    def add(name: str, values: Sequence[float | None], show: Callable[[float], str], more: bool = False) -> None:
        texts = [or_dash(show, value) for value in values]
        if name == "perplexity":
            texts = [f"{text}{_since(run)}" for text, run in zip(texts, runs, strict=True)]
        if any(value is not None for value in values):
            rows.append((name, _cells(values, texts, more) if ranked else [Cell(text) for text in texts]))

    def at(*place: str) -> list[float | None]:
        return [value_at(run.summary, *place) for run in runs]

    for name, place in NUMBERS:
        add(name, at(*place), as_share, more=True)
    add("perplexity", at("final", "perplexity"), as_plain)
    most = [most_grown(run.summary) for run in runs]
    add("change of mean |W|, at most", [row["growth"] if row else None for row in most], as_growth)
    found = [protocol_numbers(run.summary) for run in runs]
    for name in dict.fromkeys(name for numbers in found for name in numbers):
        there = [numbers.get(name, (None, as_plain)) for numbers in found]
        show = as_share if any(show is as_share for _, show in there) else as_plain
        add(name, [value for value, _ in there], show, not name.startswith("me perplexity"))
    add("seconds per edit", at("seconds", "per_edit"), "{:.2f}".format)
    return rows


def _since(run: RunRecord) -> str:
    """Return the change of a run's perplexity, in brackets."""
    after, base = end_and_base(run.summary, "perplexity")
    return "" if not base or after is None else f" ({as_growth(after / base - 1, 1)})"


def _cells(values: Sequence[float | None], texts: Sequence[str], more: bool) -> list[Cell]:
    """Return the cells of a row; the best are those with the largest, or smallest, size, if they do not read alike."""
    sizes = [value if more or value is None else abs(value) for value in values]
    there = {text: size for text, size in zip(texts, sizes, strict=True) if size is not None}
    best = (max if more else min)(there.values(), default=None) if len(there) > 1 else None
    return [Cell(text, there.get(text) == best and best is not None) for text in texts]


def charts_of(runs: Sequence[RunRecord]) -> list[Chart]:
    """Return the charts, with a line per run."""
    named = list(zip(names_of(runs), runs, strict=True))

    def lines(quantity: str) -> list[Series]:
        return [Series(name, course(run, quantity)) for name, run in named]

    found = [draw_shares(title, lines(quantity), nested=True) for title, quantity in CHARTS]
    found.append(draw("Perplexity of ordinary text", lines("perplexity"), nested=True))
    widest = [Series(name, _most(run)) for name, run in named]
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
