"""The charts of a run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

from lit_edit.report.charts import Chart, Points, Series, draw, draw_shares
from lit_edit.report.edits import Edit
from lit_edit.report.reading import KINDS, RunRecord, mean_of
from lit_edit.report.texts import as_growth, as_plain
from lit_edit.runs.holding import show_p

MOST_DOTS = 1500
MOST_WEIGHTS = 10
MOST_AGES = 5
CHOICES = (
    ("efficacy", "efficacy/accuracy"),
    ("generalization", "generalization/accuracy"),
    ("neighbours as before", "locality/agreement"),
)


def layer_names(weights: Iterable[str]) -> dict[str, str]:
    """Return short names for edited weights, with the module's name where a layer has several.

    Example:
        >>> list(layer_names(["model.layers.6.mlp.down_proj.weight", "something"]).values())
        ['layer 6', 'something']
        >>> list(layer_names(["h.1.attn.c_proj.weight", "h.1.mlp.c_proj.weight"]).values())
        ['layer 1 attn.c_proj', 'layer 1 mlp.c_proj']
    """
    parts = {weight: re.fullmatch(r"(?:.*\.)?(\d+)\.(.+)", weight) for weight in weights}
    layers = [found.group(1) for found in parts.values() if found]
    names = {}
    for weight, found in parts.items():
        names[weight] = f"layer {found.group(1)}" if found else weight
        if found and layers.count(found.group(1)) > 1:
            names[weight] += f" {found.group(2).removesuffix('.weight')}"
    return names


def course(run: RunRecord, quantity: str) -> Points:
    """Return a quantity over the edits, as in ``efficacy/success``: before, on the way, at the end."""
    points: dict[float, float] = {}
    for stage in ("base", "retention", "final"):  # the end is measured over all edits
        points |= dict(run.logged(f"{stage}/{quantity}"))
    return sorted(points.items())


def growth(run: RunRecord) -> dict[str, Points]:
    """Return by weight the growth of mean |W| over the edits, as a share."""
    logged = {
        found.group(1): run.logged(name)
        for name in run.columns
        if (found := re.fullmatch("norm/(.+)/mean_abs_w", name))
    }
    return {
        weight: [(edits, value / points[0][1] - 1) for edits, value in points]
        for weight, points in logged.items()
        if points[0][1]
    }


def charts_of(run: RunRecord) -> list[Chart]:
    """Return the charts over edits of which something is known."""
    sampled = "On the way a sample of the edits so far is measured, at the end all of them."
    grown = growth(run)
    weights = sorted(sorted(grown, key=lambda w: -abs(grown[w][-1][1]))[:MOST_WEIGHTS], key=list(grown).index)
    names = layer_names(grown)
    cut = f" The {MOST_WEIGHTS} that grew the most of {len(grown)}." if len(weights) < len(grown) else ""
    found = [
        draw_shares(
            "Preferred to the other object",
            [Series(kind, course(run, f"{kind}/success")) for kind in KINDS],
            note=f"Share of prompts where the wanted object is the likelier one. {sampled}",
        ),
        draw_shares(
            "First choice",
            [Series(name, course(run, quantity)) for name, quantity in CHOICES],
            note="Share of prompts that are continued with the new object, and of neighbours continued as before.",
        ),
        draw_shares(
            "Right after each edit",
            [Series(name, running_mean(run.logged(f"immediate/{quantity}"))) for name, quantity in CHOICES],
            note="First choices, measured at the edit itself: mean over the edits so far.",
        ),
        draw(
            "Perplexity of ordinary text",
            [Series("perplexity", course(run, "perplexity"))],
            note="Text that has nothing to do with the edits; lower is better, unchanged is the aim.",
        ),
        draw(
            "Growth of mean |W|",
            [Series(names[weight], grown[weight]) for weight in weights],
            show=as_growth,
            least=0.0,
            note=f"L1 norm per edited layer against the unedited one.{cut}",
        ),
        draw(
            "Mean |ΔW|",
            [Series(names[weight], run.logged(f"norm/{weight}/mean_abs_delta")) for weight in weights],
            note=f"L1 norm of what was added, per edited layer.{cut}",
        ),
    ]
    return [chart for chart in found if chart is not None]


def running_mean(points: Points) -> Points:
    """Return the mean of all values so far, at each place.

    Example:
        >>> running_mean([(1, 1.0), (2, 0.0), (3, 0.5)])
        [(1, 1.0), (2, 0.5), (3, 0.5)]
    """
    totals = accumulate(y for _, y in points)
    return [(x, total / count) for count, ((x, _), total) in enumerate(zip(points, totals, strict=True), 1)]


def forgetting(edits: Sequence[Edit]) -> Chart | None:
    """Draw each edit by its age: how likely the new object was right after it, and is at the end."""
    newest = max((edit.number for edit in edits), default=0)
    series = []
    for name, stage in (("right after the edit", "immediate"), ("at the end", "final")):
        answers = [(edit, getattr(edit, stage)) for edit in edits]
        seen = [(edit, said.probability) for edit, said in answers if said and said.probability is not None]
        seen = seen[:: -(-len(seen) // MOST_DOTS) or 1]
        points = [(newest - edit.number, p) for edit, p in seen]
        labels = [f"{edit.number}: {edit.subject} → {edit.wanted}, p {show_p(p)}" for edit, p in seen]
        series.append(Series(name, points, labels))
    return draw_shares(
        "Probability by age",
        series,
        x_label="age: edits made since",
        show=as_plain,
        cloud=True,
        note="Of the new object; one point per edit and moment.",
    )


def ages(edits: Sequence[Edit]) -> list[dict[str, Any]]:
    """Return rows by age, youngest first: how many edits, how many hold, and how likely their objects are."""
    newest = max((edit.number for edit in edits), default=0)
    measured = [edit for edit in reversed(edits) if edit.final]
    parts = min(MOST_AGES, len(measured))
    edges = [round(k * len(measured) / parts) for k in range(parts + 1)] if parts else []
    rows = []
    for group in (measured[a:b] for a, b in pairwise(edges)):
        first, last = ([getattr(e, stage) for e in group if getattr(e, stage)] for stage in ("immediate", "final"))
        rows.append(
            {
                "young": newest - group[0].number,
                "old": newest - group[-1].number,
                "edits": len(group),
                "held": mean_of(said.hit for said in first),
                "holds": mean_of(said.hit for said in last),
                "p_held": mean_of(said.probability for said in first),
                "p_holds": mean_of(said.probability for said in last),
            }
        )
    return rows
