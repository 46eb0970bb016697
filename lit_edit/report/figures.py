"""The numbers of a run: headlines, and all metrics before, right after and at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_edit.report.curves import layer_names
from lit_edit.report.reading import KINDS, RunRecord, look_up
from lit_edit.report.texts import TINY, as_growth, as_magnitude, as_plain, as_share, change_of, change_of_share, or_dash
from lit_edit.runs.answers import STAGES

MEASURES = ("success", "accuracy", "token_accuracy", "magnitude", "agreement")
HEADLINES = (  # kind, measure, what it says
    ("efficacy", "success", "The new object is preferred to the old one."),
    ("efficacy", "accuracy", "The new object is what the model says."),
    ("generalization", "success", "The same in other words."),
    ("generalization", "accuracy", "The new object is what it says, in other words."),
    ("locality", "success", "Neighbours prefer their own object."),
    ("locality", "agreement", "Neighbours are answered as before."),
)


@dataclass(frozen=True)
class Headline:
    """A number with its change since the unedited model, and a sentence about it."""

    title: str
    value: str
    about: str
    change: str = ""
    base: str = ""  # what it was then
    tone: str = "plain"  # of the change: or good, or bad


def value_at(summary: Mapping[str, Any], *path: str) -> float | None:
    """Return a number of a summary, or ``None`` where there is none."""
    value = look_up(summary, *path)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def mapping_at(summary: Any, *path: str) -> Mapping[str, Any]:
    """Return a part of a summary, an empty one where there is none."""
    value = look_up(summary, *path)
    return value if isinstance(value, Mapping) else {}


def end_and_base(summary: Mapping[str, Any], *path: str) -> tuple[float | None, float | None]:
    """Return a number at the end and of the unedited model."""
    return value_at(summary, "final", *path), value_at(summary, "base", *path)


def headlines(run: RunRecord) -> list[Headline]:
    """Return what stands at the top; a number that was not measured is left out."""
    summary, found = run.summary, []
    for kind, measure, about in HEADLINES:
        now, then = end_and_base(summary, kind, measure)
        if now is None and (now := value_at(summary, "immediate", kind, measure)) is not None:
            about += " Right after each edit; the end was not measured."
        if now is not None:
            found.append(share_headline(f"{kind.capitalize()} {measure}", now, then, about))
    now, then = end_and_base(summary, "score")
    if now is not None:
        found.append(share_headline("Score", now, then, "Harmonic mean of the three successes."))
    now, then = end_and_base(summary, "perplexity")
    if now is not None:
        about = "Of ordinary text; unchanged is the aim."
        found.append(ratio_headline("Perplexity", now, then, about, ("bad", "plain")))
    if most := most_grown(summary):
        about = f"Largest growth of an L1 norm: {most['layer']}."
        found.append(Headline("Mean |W|", as_growth(most["growth"]), about))
    if (seconds := value_at(summary, "seconds", "per_edit")) is not None:
        found.append(Headline("Seconds per edit", f"{seconds:.2f}", "Without measuring."))
    return found


def share_headline(title: str, now: float, then: float | None, about: str, least: float = TINY) -> Headline:
    """Return a share with its change, which is good or bad if it is more than ``least``."""
    if then is None:
        return Headline(title, as_share(now), about)
    change = now - then
    tone = "plain" if abs(change) <= least else "good" if change > 0 else "bad"
    return Headline(title, as_share(now), about, change_of_share(change), as_share(then), tone)


def ratio_headline(title: str, now: float, then: float | None, about: str, tones: tuple[str, str]) -> Headline:
    """Return a number with its relative change, and the tones of one of two per cent or more up, or down."""
    if then is None:
        return Headline(title, as_plain(now), about)
    change = now / then - 1 if then else 0.0
    tone = "plain" if abs(change) < 0.02 else tones[change < 0]
    return Headline(title, as_plain(now), about, as_growth(change, 1) if then else "", as_plain(then), tone)


def metric_rows(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return a row per metric."""
    places: list[tuple[str, ...]] = [(kind, measure) for kind in KINDS for measure in MEASURES]
    rows = []
    for place in [*places, ("score",), ("perplexity",)]:
        values = {stage: value_at(summary, stage, *place) for stage in STAGES}
        if any(value is not None for value in values.values()):
            show = {"magnitude": as_magnitude, "perplexity": as_plain}.get(place[-1], as_share)
            rows.append(metric_row(place, values, show))
    return rows


def metric_row(
    place: Sequence[str], values: Mapping[str, float | None], show: Callable[[float], str]
) -> dict[str, str]:
    """Return a row of the table of metrics: before, right after each edit, at the end, and the change since before."""
    base, final = values["base"], values["final"]
    change = "" if base is None or final is None else change_of(show, base, final)
    cells = {stage: or_dash(show, values.get(stage)) for stage in STAGES}
    return {"name": name_of(place), **cells, "change": change}


def name_of(place: Sequence[str]) -> str:
    """Return what a number of a summary is called, by its place."""
    return " ".join(place).replace("_", " ")


def layer_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row per edited weight: its L1 norm before and after, and that of what was added."""
    rows = []
    layers = mapping_at(summary, "layers")
    names = layer_names(layers)
    for weight, norms in layers.items():
        before, after = value_at(norms, "mean_abs_before"), value_at(norms, "mean_abs_after")
        rows.append(
            {
                "weight": weight,
                "layer": names[weight],
                "before": before,
                "after": after,
                "growth": after / before - 1 if before and after is not None else None,
                "delta": value_at(norms, "mean_abs_delta"),
                "relative": value_at(norms, "relative_change"),
            }
        )
    return rows


def most_grown(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the row of the edited weight whose L1 norm has changed the most, if there is one."""
    grown = [row for row in layer_rows(summary) if row["growth"] is not None]
    return max(grown, key=lambda row: abs(row["growth"]), default=None)
