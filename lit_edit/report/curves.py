"""The charts of a run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from lit_edit.report.charts import Chart, Series, as_growth, as_plain, as_share, draw, groups_by_size, running_mean
from lit_edit.report.edits import Edit
from lit_edit.report.reading import KINDS, RunRecord
from lit_edit.runs.holding import show_p

SHARES = (-0.02, 1.02)
MOST_DOTS = 1500
MOST_WEIGHTS = 10
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


def course(run: RunRecord, quantity: str) -> list[tuple[float, float]]:
    """Return a quantity over the edits, as in ``efficacy/success``: before, on the way, at the end."""
    points: dict[float, float] = {}
    for edits, values in sorted(run.rows.items()):
        for stage in ("base", "retention", "final"):  # the end is measured over all edits
            if f"{stage}/{quantity}" in values:
                points[edits] = values[f"{stage}/{quantity}"]
    return sorted(points.items())


def growth(run: RunRecord) -> dict[str, list[tuple[float, float]]]:
    """Return by weight the growth of mean |W| over the edits, as a share."""
    found: dict[str, list[tuple[float, float]]] = {}
    first: dict[str, float] = {}
    for edits, values in sorted(run.rows.items()):
        for name, value in values.items():
            if name.startswith("norm/") and name.endswith("/mean_abs_w"):
                weight = name.removeprefix("norm/").removesuffix("/mean_abs_w")
                if base := first.setdefault(weight, value):
                    found.setdefault(weight, []).append((edits, value / base - 1))
    return found


def charts_of(run: RunRecord) -> list[Chart]:
    """Return the charts over edits of which something is known."""
    sampled = "On the way a sample of the edits so far is measured, at the end all of them."
    grown = growth(run)
    weights = sorted(sorted(grown, key=lambda w: -abs(grown[w][-1][1]))[:MOST_WEIGHTS], key=list(grown).index)
    names = layer_names(grown)
    cut = f" The {MOST_WEIGHTS} that grew the most of {len(grown)}." if len(weights) < len(grown) else ""

    def shares(title: str, place: str, lines: Iterable[tuple[str, str]], note: str) -> Chart | None:
        def points(quantity: str) -> list[tuple[float, float]]:
            return running_mean(_logged(run, f"{place}/{quantity}")) if place else course(run, quantity)

        drawn = [Series(name, points(quantity)) for name, quantity in lines]
        return draw(title, drawn, show=as_share, limits=SHARES, note=note)

    likelier = f"Share of prompts where the wanted object is the likelier one. {sampled}"
    first = "Share of prompts that are continued with the new object, and of neighbours continued as before."
    at_once = "First choices, measured at the edit itself: mean over the edits so far."
    found = [
        shares("Preferred to the other object", "", [(kind, f"{kind}/success") for kind in KINDS], likelier),
        shares("First choice", "", CHOICES, first),
        shares("Right after each edit", "immediate", CHOICES, at_once),
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
            [Series(names[weight], _logged(run, f"norm/{weight}/mean_abs_delta")) for weight in weights],
            note=f"L1 norm of what was added, per edited layer.{cut}",
        ),
    ]
    return [chart for chart in found if chart is not None]


def _logged(run: RunRecord, name: str) -> list[tuple[float, float]]:
    return [(edits, values[name]) for edits, values in sorted(run.rows.items()) if name in values]


def forgetting(edits: Sequence[Edit]) -> Chart | None:
    """Draw each edit by its age: how likely the new object was right after it, and is at the end."""
    newest = max((edit.number for edit in edits), default=0)
    series = []
    for name, stage in (("right after the edit", "immediate"), ("at the end", "final")):
        seen = [
            (edit, said)
            for edit in edits
            if (said := getattr(edit, stage)) is not None and said.probability is not None
        ]
        seen = seen[:: -(-len(seen) // MOST_DOTS) or 1]
        series.append(
            Series(
                name,
                [(newest - edit.number, said.probability) for edit, said in seen],
                [f"{edit.number}: {edit.subject} → {edit.wanted}, p {show_p(said.probability)}" for edit, said in seen],
            )
        )
    return draw(
        "Probability by age",
        series,
        x_label="age: edits made since",
        limits=SHARES,
        show=as_plain,
        cloud=True,
        note="Of the new object; one point per edit and moment.",
    )


def ages(edits: Sequence[Edit]) -> list[dict[str, Any]]:
    """Return rows by age, youngest first: how many edits, how many hold, and how likely their objects are."""
    newest = max((edit.number for edit in edits), default=0)
    measured = [edit for edit in reversed(edits) if edit.final is not None]
    rows = []
    for part in groups_by_size(range(len(measured))):
        group = measured[part]
        rows.append(
            {
                "young": newest - group[0].number,
                "old": newest - group[-1].number,
                "edits": len(group),
                "held": _mean([float(e.immediate.hit) for e in group if e.immediate]),
                "holds": _mean([float(e.final.hit) for e in group if e.final]),
                "p_held": _mean([e.immediate.probability for e in group if e.immediate]),
                "p_holds": _mean([e.final.probability for e in group if e.final]),
            }
        )
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
