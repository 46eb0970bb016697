"""The numbers of a run: headlines, and all metrics before, right after and at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_edit.report.charts import as_growth, as_plain, as_share, or_dash
from lit_edit.report.curves import layer_names
from lit_edit.report.reading import KINDS, RunRecord, look_up

STAGES = ("base", "immediate", "final")
MEASURES = ("success", "accuracy", "token_accuracy", "magnitude", "agreement")
HEADLINES = (  # kind, measure, what it says
    ("efficacy", "success", "The new object is preferred to the old one."),
    ("efficacy", "accuracy", "The new object is what the model says."),
    ("generalization", "success", "The same in other words."),
    ("generalization", "accuracy", "The new object is what it says, in other words."),
    ("locality", "success", "Neighbours prefer their own object."),
    ("locality", "agreement", "Neighbours are answered as before."),
)
TINY = 5e-4  # differences that read as none


@dataclass(frozen=True)
class Headline:
    """A number with its change.

    Attributes:
        title: What it is of.
        value: Now.
        change: Since the unedited model, signed.
        base: Then.
        tone: ``good``, ``bad`` or ``plain``.
        about: A sentence.
    """

    title: str
    value: str
    change: str
    base: str
    tone: str
    about: str


def value_at(summary: Mapping[str, Any], *path: str) -> float | None:
    """Return a number of a summary, or ``None`` where there is none."""
    value = look_up(summary, *path)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def mapping_at(summary: Any, *path: str) -> Mapping[str, Any]:
    """Return a part of a summary, an empty one where there is none."""
    value = look_up(summary, *path)
    return value if isinstance(value, Mapping) else {}


def signed(text: str, value: float) -> str:
    """Return a text with a plus where the value is positive."""
    return f"+{text}" if value > 0 and not text.startswith("+") else text


def change_of_share(value: float) -> str:
    """Return a difference of shares.

    Example:
        >>> change_of_share(0.75), change_of_share(-0.111), change_of_share(0.0)
        ('+75.0 points', '−11.1 points', '±0')
    """
    return signed(f"{100 * value:.1f} points".replace("-", "−"), value) if abs(value) > TINY else "±0"


def headlines(run: RunRecord) -> list[Headline]:
    """Return what stands at the top; a number that was not measured is left out."""
    summary, found = run.summary, []
    for kind, measure, about in HEADLINES:
        now, then = value_at(summary, "final", kind, measure), value_at(summary, "base", kind, measure)
        if now is None and (now := value_at(summary, "immediate", kind, measure)) is not None:
            about += " Right after each edit; the end was not measured."
        if now is not None:
            found.append(share_headline(f"{kind.capitalize()} {measure}", now, then, about))
    if (score := value_at(summary, "final", "score")) is not None:
        about = "Harmonic mean of the three successes."
        found.append(share_headline("Score", score, value_at(summary, "base", "score"), about))
    found += _costs(run)
    return found


def share_headline(title: str, now: float, then: float | None, about: str, least: float = TINY) -> Headline:
    """Return a share with its change, which is good or bad if it is more than ``least``."""
    difference = 0.0 if then is None else now - then
    tone = "good" if difference > least else "bad" if difference < -least else "plain"
    change = "" if then is None else change_of_share(difference)
    return Headline(title, as_share(now), change, "" if then is None else as_share(then), tone, about)


def ratio_headline(title: str, now: float, then: float | None, about: str, tones: tuple[str, str]) -> Headline:
    """Return a number with its relative change, and the tones of one of two per cent or more up, or down."""
    change = now / then - 1 if then else 0.0
    tone = "plain" if abs(change) < 0.02 else tones[change < 0]
    text = signed(as_share(change), change) if then else ""
    return Headline(title, as_plain(now), text, "" if then is None else as_plain(then), tone, about)


def _costs(run: RunRecord) -> list[Headline]:
    summary, found = run.summary, []
    now, then = value_at(summary, "final", "perplexity"), value_at(summary, "base", "perplexity")
    if now is not None:
        found.append(
            ratio_headline("Perplexity", now, then, "Of ordinary text; unchanged is the aim.", ("bad", "plain"))
        )
    layers = [row for row in layer_rows(summary) if row["growth"] is not None]
    if layers:
        most = max(layers, key=lambda row: abs(row["growth"]))
        about = f"Largest growth of an L1 norm: {most['layer']}."
        found.append(Headline("Mean |W|", as_growth(most["growth"]), "", "", "plain", about))
    if (seconds := value_at(summary, "seconds", "per_edit")) is not None:
        found.append(Headline("Seconds per edit", f"{seconds:.2f}", "", "", "plain", "Without measuring."))
    return found


def metric_rows(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return a row per metric: before, right after each edit, at the end, and the change since before."""
    places: list[tuple[str, ...]] = [(kind, measure) for kind in KINDS for measure in MEASURES]
    rows = []
    for place in [*places, ("score",), ("perplexity",)]:
        values = [value_at(summary, stage, *place) for stage in STAGES]
        if all(value is None for value in values):
            continue
        show = {"magnitude": _magnitude, "perplexity": as_plain}.get(place[-1], as_share)
        row = {"name": name_of(place), **{s: or_dash(show, v) for s, v in zip(STAGES, values, strict=True)}}
        base, final = values[0], values[2]
        row["change"] = "" if base is None or final is None else _difference(place[-1], final, base)
        rows.append(row)
    return rows


def name_of(place: Sequence[str]) -> str:
    """Return what a number of a summary is called, by its place."""
    return " ".join(place).replace("_", " ")


def _magnitude(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def _difference(measure: str, final: float, base: float) -> str:
    if measure == "perplexity":
        return signed(as_share(final / base - 1), final - base) if base else ""
    return signed(_magnitude(final - base), final - base) if measure == "magnitude" else change_of_share(final - base)


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
