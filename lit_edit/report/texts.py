"""Numbers as a page shows them: with a true minus, and a plus where they are changes."""

from __future__ import annotations

import math
from collections.abc import Callable

TINY = 5e-4  # differences that read as none


def as_share(value: float) -> str:
    """Return a share in percent.

    Example:
        >>> as_share(0.9167), as_share(1.0), as_share(-0.005)
        ('91.7%', '100.0%', '−0.5%')
    """
    return _minus(f"{100 * value:.1f}%")


def as_growth(value: float, digits: int = 2) -> str:
    """Return a growth in percent.

    Example:
        >>> as_growth(0.0039), as_growth(-0.01), as_growth(0.0), as_growth(0.5, 1)
        ('+0.39%', '−1.00%', '0.00%', '+50.0%')
    """
    return _signed(f"{100 * value:.{digits}f}%", value)


def as_plain(value: float) -> str:
    """Return a number with as many digits as it needs to be told from its like.

    Example:
        >>> as_plain(53.96), as_plain(0.01092), as_plain(12345.6), as_plain(2e9), as_plain(0)
        ('54.0', '0.0109', '12,346', '2e+09', '0')
    """
    size = abs(value)
    if not math.isfinite(value):
        return "not finite"
    if not 1 <= size < 1e6:
        return _minus(f"{value:.3g}")
    return _minus(f"{value:,.{0 if size >= 100 else 1 if size >= 10 else 2}f}")


def as_magnitude(value: float) -> str:
    """Return a mean difference of probabilities."""
    return _minus(f"{value:.3f}")


def or_dash(show: Callable[[float], str], value: float | None) -> str:
    """Return a number as it is shown, a dash where there is none."""
    return "–" if value is None else show(value)


def change_of_share(value: float) -> str:
    """Return a difference of shares.

    Example:
        >>> change_of_share(0.75), change_of_share(-0.111), change_of_share(0.0)
        ('+75.0 points', '−11.1 points', '±0')
    """
    return _signed(f"{100 * value:.1f} points", value) if abs(value) > TINY else "±0"


def change_of(show: Callable[[float], str], base: float, final: float) -> str:
    """Return the change of a number in its own way: shares in points, magnitudes as they are, others in percent.

    Example:
        >>> change_of(as_share, 0.5, 0.75), change_of(as_magnitude, 0.5, 0.25), change_of(as_plain, 50, 55)
        ('+25.0 points', '−0.250', '+10.0%')
    """
    if show is as_share:
        return change_of_share(final - base)
    if show is as_magnitude:
        return _signed(as_magnitude(final - base), final - base)
    return as_growth(final / base - 1, 1) if base else ""


def tick_text(value: float, show: Callable[[float], str]) -> str:
    """Return the value of a tick with no more digits than it needs, in the unit in which values are shown.

    Example:
        >>> tick_text(0.25, as_share), tick_text(0.25, as_growth), tick_text(2000, as_plain), tick_text(0.25, as_plain)
        ('25%', '+25%', '2,000', '0.25')
    """
    unit = show(0.5)
    if unit.endswith("%"):
        text = f"{100 * value:.6g}%"
        return _signed(text, value) if unit.startswith("+") else _minus(text)
    return _minus(f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.6g}")


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _signed(text: str, value: float) -> str:
    return _minus(f"{'+' * (value > 0)}{text}")
