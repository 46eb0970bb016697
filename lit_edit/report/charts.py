"""Charts as geometry; a template draws them as inline SVG, whose colours follow the page's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

WIDTH, HEIGHT = 480, 280
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 42
COLOURS = 7  # .c0 to .c6 in style.css
MOST_POINTS = 240
LOGARITHMIC = 20
"""Where the largest value is more times the smallest, the small ones would lie on each other otherwise."""

Points = Sequence[tuple[float, float]]


@dataclass
class Series:
    """A line, or a cloud of points.

    Attributes:
        name: For the legend.
        points: ``(x, y)``; a y that is not finite breaks the line and is a triangle at the upper edge.
        labels: Per point, what is said of it; for clouds.
    """

    name: str
    points: Points
    labels: Sequence[str] = ()


@dataclass
class Drawn:
    """A series in the picture's own units."""

    name: str
    look: str
    path: str = ""
    dots: list[tuple[str, str, str]] = field(default_factory=list)  # x, y, what is said of it
    beyond: list[str] = field(default_factory=list)  # x of what is not finite
    last: str = ""
    width: str = "2.2"


@dataclass
class Chart:
    """All that the template needs."""

    title: str
    note: str
    x_label: str
    series: list[Drawn]
    x_ticks: list[tuple[str, str]]
    y_ticks: list[tuple[str, str]]
    hover: str
    cloud: bool = False
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def as_share(value: float) -> str:
    """Return a share in percent.

    Example:
        >>> as_share(0.9167), as_share(1.0), as_share(-0.005)
        ('91.7%', '100.0%', '−0.5%')
    """
    return f"{100 * value:.1f}%".replace("-", "−")


def or_dash(show: Callable[[float], str], value: float | None) -> str:
    """Return a number as it is shown, a dash where there is none."""
    return "–" if value is None else show(value)


def as_growth(value: float) -> str:
    """Return a growth in percent.

    Example:
        >>> as_growth(0.0039), as_growth(-0.01), as_growth(0.0)
        ('+0.39%', '−1.00%', '0.00%')
    """
    return f"{100 * value:{'+' if value else ''}.2f}%".replace("-", "−")


def as_plain(value: float) -> str:
    """Return a number with as many digits as it needs to be told from its like.

    Example:
        >>> as_plain(53.96), as_plain(0.01092), as_plain(12345.6), as_plain(2e9), as_plain(0)
        ('54.0', '0.0109', '12,346', '2e+09', '0')
    """
    size = abs(value)
    if not math.isfinite(value):
        text = "not finite"
    elif size >= 1e6:
        text = f"{value:.3g}"
    elif size >= 100:
        text = f"{value:,.0f}"
    elif size >= 10:
        text = f"{value:.1f}"
    elif size >= 1:
        text = f"{value:.2f}"
    else:
        text = f"{value:.3g}"
    return text.replace("-", "−") if not text.startswith("not") else text


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers within a range.

    Example:
        >>> nice_ticks(0, 1), nice_ticks(0, 12)
        ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.0, 2.5, 5.0, 7.5, 10.0])
    """
    if not high > low:
        return [low]
    rough = (high - low) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(step * k, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def draw(
    title: str,
    series: Iterable[Series],
    *,
    x_label: str = "edits",
    note: str = "",
    show: Callable[[float], str] = as_plain,
    limits: tuple[float, float] | None = None,
    least: float = 0.05,
    cloud: bool = False,
    nested: bool = False,
) -> Chart | None:
    """Lay a chart out.

    Args:
        title: What is drawn.
        series: The lines; empty ones are left out.
        x_label: Below.
        note: A sentence on how to read it.
        show: Writes a value.
        limits: Of the y axis; by default those of the values.
        least: How much of its values the y axis shows at least: small differences are to look small.
        cloud: Points without lines.
        nested: The first line is the broadest, the last the thinnest and on top: those that coincide stay visible.

    Returns:
        Nothing if there are no values.
    """
    wanted = [one for one in series if len(one.points)]
    if not wanted:
        return None
    kept = [one if cloud else Series(one.name, thin(one.points)) for one in wanted]
    finite = [y for one in kept for _, y in one.points if math.isfinite(y)]
    x_low, x_high = _span([x for one in kept for x, _ in one.points])
    low, high, logarithmic = _y_axis(finite, limits, least)

    def place(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def rise(y: float) -> float:
        share = math.log(y / low) / math.log(high / low) if logarithmic else (y - low) / (high - low)
        return HEIGHT - BOTTOM - min(1.0, max(0.0, share)) * (HEIGHT - TOP - BOTTOM)

    drawn = [_draw_one(one, number, place, rise, show, cloud) for number, one in enumerate(kept)]
    for number, line in enumerate(drawn):
        if nested and len(drawn) > 1:
            line.width = f"{5 - 3.2 * number / (len(drawn) - 1):.2g}"
    ticks = _log_ticks(low, high) if logarithmic else nice_ticks(low, high)
    steps = [x for x in nice_ticks(x_low, x_high) if x == int(x)]
    texts = _tick_texts(ticks, show)
    return Chart(
        title=f"{title}, logarithmic" if logarithmic else title,
        note=note,
        x_label=x_label,
        series=drawn,
        x_ticks=[(_at(place(x)), f"{int(x):,}") for x in steps],
        y_ticks=[(_at(rise(y)), text) for y, text in zip(ticks, texts, strict=True)],
        hover=_hover(kept, place, rise, show, cloud),
        cloud=cloud,
    )


def thin(points: Points, most: int = MOST_POINTS) -> Points:
    """Return at most so many points, evenly chosen, the first and the last among them.

    Example:
        >>> thin([(x, 0.0) for x in range(7)], most=3)
        [(0, 0.0), (3, 0.0), (6, 0.0)]
    """
    if len(points) <= most:
        return points
    return [points[round(k * (len(points) - 1) / (most - 1))] for k in range(most)]


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low, low + 1)


def _y_axis(values: Sequence[float], limits: tuple[float, float] | None, least: float) -> tuple[float, float, bool]:
    if limits is not None:
        return *limits, False
    if not values:
        return 0.0, 1.0, False
    low, high = min(values), max(values)
    if low > 0 and high / low > LOGARITHMIC:
        return low / 1.3, high * 1.3, True
    room = max(0.06 * (high - low), (least * max(abs(low), abs(high)) - (high - low)) / 2)
    room = room or 0.5
    bottom = 0.0 if 0 <= low < room else low - room  # no negative ticks where nothing is
    return bottom, high + room, False


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    step = max(1, -(-(last - first + 1) // 6))
    ticks = [10.0**k for k in range(first, last + 1, step)]
    return ticks if len(ticks) > 1 else [low * 1.3, high / 1.3]


def _tick_texts(ticks: Sequence[float], show: Callable[[float], str]) -> list[str]:
    """Return ticks with no more digits than they need, in the unit of the values."""
    if not show(0.5).endswith("%"):
        return [(f"{y:,.0f}" if 1e3 <= abs(y) < 1e6 else f"{y:.6g}").replace("-", "−") for y in ticks]
    sign = "+" if show(0.5).startswith("+") else ""
    return [(f"{100 * y:{sign if y else ''}.6g}%").replace("-", "−") for y in ticks]


def _draw_one(
    one: Series,
    number: int,
    place: Callable[[float], float],
    rise: Callable[[float], float],
    show: Callable[[float], str],
    cloud: bool,
) -> Drawn:
    drawn = Drawn(one.name, f"c{number % COLOURS} d{number // COLOURS % 3}")
    fresh = True
    for at, (x, y) in enumerate(one.points):
        if not math.isfinite(y):
            drawn.beyond.append(_at(place(x)))
            fresh = True
            continue
        if not cloud:
            drawn.path += f"{'M' if fresh else 'L'}{_at(place(x))} {_at(rise(y))}"
        if cloud or len(one.points) <= 30:
            said = one.labels[at] if one.labels else f"{one.name} {show(y)}"
            drawn.dots.append((_at(place(x)), _at(rise(y)), said))
        fresh = False
    drawn.last = "" if cloud else show(one.points[-1][1])
    return drawn


def _hover(
    series: Sequence[Series],
    place: Callable[[float], float],
    rise: Callable[[float], float],
    show: Callable[[float], str],
    cloud: bool,
) -> str:
    """Return what the script shows below the pointer, as JSON; points of clouds carry it themselves."""
    if cloud:
        return ""
    xs = sorted({x for one in series for x, _ in one.points})
    lines: list[dict[str, Any]] = []
    for one in series:
        values = dict(one.points)
        there = [values.get(x) for x in xs]
        lines.append({"y": ["" if y is None else show(y) for y in there]})
    return json.dumps({"x": [float(_at(place(x))) for x in xs], "n": [_number(x) for x in xs], "s": lines})


def _number(value: float) -> float:
    return int(value) if value == int(value) else value


def _at(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def running_mean(points: Points) -> list[tuple[float, float]]:
    """Return the mean of all values so far, at each place.

    Example:
        >>> running_mean([(1, 1.0), (2, 0.0), (3, 0.5)])
        [(1, 1.0), (2, 0.5), (3, 0.5)]
    """
    totals = accumulate(y for _, y in points)
    return [(x, total / count) for count, ((x, _), total) in enumerate(zip(points, totals, strict=True), 1)]


def groups_by_size(sizes: Sequence[int], most: int = 5) -> list[slice]:
    """Cut a list into at most so many parts of about the same length.

    Example:
        >>> groups_by_size(range(7), 3)
        [slice(0, 2, None), slice(2, 5, None), slice(5, 7, None)]
    """
    parts = min(most, len(sizes))
    edges = [round(k * len(sizes) / parts) for k in range(parts + 1)] if parts else []
    return [slice(a, b) for a, b in pairwise(edges)]
