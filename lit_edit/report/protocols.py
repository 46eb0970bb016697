"""What the longer protocols have measured: texts and answers, portability, ME-PPL and general ability."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lit_edit.ability.course import mean_accuracy
from lit_edit.report.charts import Chart, Series, draw, draw_shares
from lit_edit.report.figures import Headline, mapping_at, metric_row, name_of, ratio_headline, share_headline, value_at
from lit_edit.report.reading import KINDS, RunRecord, mean_of
from lit_edit.report.texts import as_plain, as_share, change_of_share, or_dash

Show = Callable[[float], str]

SHOWN_ELSEWHERE = (*KINDS, "score", "perplexity", "sample")
NOT_SHARES = ("fluency", "consistency", "me_perplexity")
ME_PERPLEXITY = ("mean", "median", "corpus")


def protocol_headlines(run: RunRecord) -> list[Headline]:
    """Return what stands at the top besides success and accuracy; what was not measured is left out."""
    summary, found = run.summary, []
    up, down = ("good", "bad"), ("bad", "good")  # tones of a rise, and of a fall
    for title, place, tones, about in (
        ("Fluency", ("fluency",), up, "Entropy of the n-grams of what it writes, in bits; a fall is repetition."),
        ("Consistency", ("consistency",), up, "Likeness of what it writes to texts about the new object."),
        ("ME-PPL", ("me_perplexity", "mean"), down, "Mean perplexity of sentences; above 1000 a model has collapsed."),
    ):
        if (now := value_at(summary, "final", *place)) is not None:
            found.append(ratio_headline(title, now, value_at(summary, "base", *place), about, tones))
    for title, mean, about in (
        ("Portability", _portability, "Tokens of what follows from the new fact: mean over kinds."),
        ("General ability", mean_accuracy, "Mean accuracy over few-shot tasks, by the likeliest option."),
    ):
        if (now := mean(summary, "final")) is not None:
            found.append(share_headline(title, now, mean(summary, "base"), about, least=0.01))
    return found


def _portability(summary: Mapping[str, Any], stage: str) -> float | None:
    return mean_of(value for _, value in _numbers(mapping_at(summary, stage, "portability")))


def protocol_rows(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return a row per number of the longer protocols, in the shape of :func:`lit_edit.report.figures.metric_rows`."""
    base, final = (dict(_numbers(mapping_at(summary, stage))) for stage in ("base", "final"))
    places = [place for place in dict.fromkeys([*base, *final]) if place[0] not in SHOWN_ELSEWHERE]
    return [metric_row(p, {"base": base.get(p), "final": final.get(p)}, _show_at(p)) for p in places]


def _show_at(place: tuple[str, ...]) -> Show:
    """Return how a number is shown: perplexities and entropies are no shares, nor is how many edits a mean is of."""
    return as_plain if place[0] in NOT_SHARES or place[-1] == "size" else as_share


def protocol_numbers(summary: Mapping[str, Any]) -> dict[str, tuple[float | None, Show]]:
    """Return the numbers of the longer protocols at the end, by name, and how each is shown."""
    found: dict[str, tuple[float | None, Show]] = {
        name_of(place): (value, _show_at(place))
        for place, value in _numbers(mapping_at(summary, "final"))
        if place[0] not in SHOWN_ELSEWHERE
    }
    ability = mean_accuracy(summary, "final")
    return found if ability is None else {**found, "general ability": (ability, as_share)}


def ability_rows(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return a row per task: accuracy before and at the end, each with its interval, and the change with its own."""
    base, final = mapping_at(summary, "ability", "base"), mapping_at(summary, "ability", "final")
    return [
        {
            "task": str(task),
            "chance": or_dash(as_share, value_at(final, task, "majority")),
            "base": _with_interval(mapping_at(base, task, "likelihood")),
            "final": _with_interval(mapping_at(final, task, "likelihood")),
            "change": _change(mapping_at(summary, "ability", "change", task, "likelihood")),
        }
        for task in final
    ]


def _accuracy(scores: Mapping[str, Any]) -> list[float | None]:
    return [value_at(scores, name) for name in ("accuracy", "accuracy_low", "accuracy_high")]


def _with_interval(scores: Mapping[str, Any]) -> str:
    value, low, high = _accuracy(scores)
    interval = "" if low is None or high is None else f" ({as_share(low)}–{as_share(high)})"
    return "–" if value is None else f"{as_share(value)}{interval}"


def _change(found: Mapping[str, Any]) -> str:
    value, low, high = _accuracy(found)
    interval = "" if low is None or high is None else f" ({100 * low:+.0f} to {100 * high:+.0f})".replace("-", "−")
    return "" if value is None else f"{change_of_share(value)}{interval}"


def protocol_charts(run: RunRecord) -> list[Chart]:
    """Return the charts over edits of general ability and ME-PPL, where they were measured."""
    accuracies = [name for name in run.columns if re.fullmatch("ability/.+/accuracy", name)]
    found = [
        draw_shares(
            "General ability",
            [Series(name.split("/")[1], run.logged(name)) for name in accuracies],
            note="Accuracy on few-shot tasks that have nothing to do with the edits, by the likeliest option.",
        ),
        draw(
            "ME-PPL",
            [Series(name, run.logged(f"me_perplexity/{name}")) for name in ME_PERPLEXITY],
            note="Perplexity of sentences: mean over sentences (as published), their median, and that of the whole.",
        ),
    ]
    return [chart for chart in found if chart is not None]


def _numbers(tree: Mapping[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    """Yield all finite numbers of a tree with their places.

    Example:
        >>> list(_numbers({"a": {"b": 1, "c": None}, "d": True}))
        [(('a', 'b'), 1.0)]
    """
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, (*place, str(name)))
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            yield (*place, str(name)), float(value)
