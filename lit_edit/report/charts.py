"""Charts as geometry; a template draws them as inline SVG, whose colours follow the page's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lit_edit.report.texts import as_plain, as_share, tick_text

WIDTH, HEIGHT = 480, 280
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 42
COLOURS = 7  # .c0 to .c6 in style.css
MOST_POINTS = 240
LOGARITHMIC = 20
"""Where the largest value is more times the smallest, the small ones would lie on each other otherwise."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """A line, or a cloud of points."""

    name: str
    points: Points  # a y that is not finite breaks the line and is a triangle at the upper edge
    labels: Sequence[str] = ()  # of a cloud: what is said of each point


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
    cloud: bool

    width, height = WIDTH, HEIGHT
    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM


@dataclass(frozen=True)
class _Frame:
    """From values to places in the picture, as SVG writes them."""

    x_low: float
    x_high: float
    low: float
    high: float
    logarithmic: bool

    def x(self, value: float) -> str:
        return _at(LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT))

    def y(self, value: float) -> str:
        if self.logarithmic:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return _at(HEIGHT - BOTTOM - min(1.0, max(0.0, share)) * (HEIGHT - TOP - BOTTOM))

    def y_ticks(self) -> list[float]:
        return log_ticks(self.low, self.high) if self.logarithmic else nice_ticks(self.low, self.high)


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
    """Lay a chart out; nothing if there are no values.

    The y axis has ``limits``, or those of the values, of which it shows at least the share ``least``: small differences
    are to look small. Of ``nested`` lines the first is the broadest, the last the thinnest and on top: those that
    coincide stay visible. A ``cloud`` has points without lines.
    """
    kept = [one if cloud else replace(one, points=thin(one.points)) for one in series if len(one.points)]
    if not kept:
        return None
    frame = _frame_of(kept, limits, least)
    drawn = [_draw_one(one, number, frame, show, cloud) for number, one in enumerate(kept)]
    for number, line in enumerate(drawn if nested and len(drawn) > 1 else ()):
        line.width = f"{5 - 3.2 * number / (len(drawn) - 1):.2g}"
    return Chart(
        title=f"{title}, logarithmic" if frame.logarithmic else title,
        note=note,
        x_label=x_label,
        series=drawn,
        x_ticks=[(frame.x(x), f"{int(x):,}") for x in nice_ticks(frame.x_low, frame.x_high) if x == int(x)],
        y_ticks=[(frame.y(y), tick_text(y, show)) for y in frame.y_ticks()],
        hover="" if cloud else _hover(kept, frame, show),  # points of clouds say it themselves
        cloud=cloud,
    )


def draw_shares(
    title: str, series: Iterable[Series], show: Callable[[float], str] = as_share, **options: Any
) -> Chart | None:
    """Lay a chart of shares out: in percent, from none to all; options as for :func:`draw`."""
    return draw(title, series, show=show, limits=(-0.02, 1.02), **options)


def thin(points: Points, most: int = MOST_POINTS) -> Points:
    """Return at most so many points, evenly chosen, the first and the last among them.

    Example:
        >>> thin([(x, 0.0) for x in range(7)], most=3)
        [(0, 0.0), (3, 0.0), (6, 0.0)]
    """
    if len(points) <= most:
        return points
    return [points[round(k * (len(points) - 1) / (most - 1))] for k in range(most)]


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


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten within a range; where it holds but one, values near its ends."""
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    ticks = [10.0**k for k in range(first, last + 1, max(1, -(-(last - first + 1) // 6)))]
    return ticks if len(ticks) > 1 else [low * 1.3, high / 1.3]


def _frame_of(series: Sequence[Series], limits: tuple[float, float] | None, least: float) -> _Frame:
    xs = [x for one in series for x, _ in one.points]
    x_low, x_high = min(xs), max(xs)
    x_high = x_high if x_high > x_low else x_low + 1
    ys = [y for one in series for _, y in one.points if math.isfinite(y)]
    if limits or not ys:
        return _Frame(x_low, x_high, *(limits or (0.0, 1.0)), logarithmic=False)
    low, high = min(ys), max(ys)
    if low > 0 and high / low > LOGARITHMIC:
        return _Frame(x_low, x_high, low / 1.3, high * 1.3, logarithmic=True)
    room = max(0.06 * (high - low), (least * max(abs(low), abs(high)) - (high - low)) / 2) or 0.5
    bottom = 0.0 if 0 <= low < room else low - room  # no negative ticks where nothing is
    return _Frame(x_low, x_high, bottom, high + room, logarithmic=False)


def _draw_one(one: Series, number: int, frame: _Frame, show: Callable[[float], str], cloud: bool) -> Drawn:
    drawn = Drawn(one.name, f"c{number % COLOURS} d{number // COLOURS % 3}")
    step = "M"
    for at, (x, y) in enumerate(one.points):
        if not math.isfinite(y):
            drawn.beyond.append(frame.x(x))
            step = "M"
            continue
        if not cloud:
            drawn.path += f"{step}{frame.x(x)} {frame.y(y)}"
        if cloud or len(one.points) <= 30:
            drawn.dots.append((frame.x(x), frame.y(y), one.labels[at] if one.labels else f"{one.name} {show(y)}"))
        step = "L"
    drawn.last = "" if cloud else show(one.points[-1][1])
    return drawn


def _hover(series: Sequence[Series], frame: _Frame, show: Callable[[float], str]) -> str:
    """Return what the script shows below the pointer, as JSON."""
    xs = sorted({x for one in series for x, _ in one.points})
    values = [dict(one.points) for one in series]
    lines = [{"y": [show(found[x]) if x in found else "" for x in xs]} for found in values]
    numbers = [int(x) if x == int(x) else x for x in xs]
    return json.dumps({"x": [float(frame.x(x)) for x in xs], "n": numbers, "s": lines})


def _at(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
