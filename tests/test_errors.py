"""Checks of arguments: what they let through, and what they say of the first that they do not."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest

from lit_edit.errors import (
    check_known,
    check_least,
    check_not_negative,
    check_one_of,
    check_positive,
    check_within,
)


def test_what_fits_passes() -> None:
    check_positive(lr=1e-9, eta=3)
    check_not_negative(decay=0.0, limit=2)
    check_least(1, steps=1, width=None)
    check_one_of(("mean", "last"), position="last")
    check_known(iter(("rome", "memit")), method="memit", other="rome")
    check_within("[0, 1)", drop=0)
    check_within("(0, 1]", keep=1)


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: check_positive(lr=0.1, eta=math.inf), "eta must be positive and finite, got inf"),
        (lambda: check_positive(lr=math.nan), "lr must be positive and finite, got nan"),
        (lambda: check_not_negative(decay=-1), "decay must not be negative or infinite, got -1"),
        (lambda: check_least(2, steps=1), "steps must be at least 2, got 1"),
        (lambda: check_one_of((1, 2, "e"), base="f"), "base must be 1, 2 or 'e', got 'f'"),
        (lambda: check_known(("a", "b"), kind=None), "kind must be one of a, b, got None"),
        (lambda: check_within("(0, 1)", share=1), "share must be in (0, 1), got 1"),
        (lambda: check_within("(0, 1)", share=0.0), "share must be in (0, 1), got 0.0"),
        (lambda: check_within("[0, 1]", fine=0, share=-0.5), "share must be in [0, 1], got -0.5"),
        (lambda: check_within("[0, 1]", share=math.nan), "share must be in [0, 1], got nan"),
    ],
)
def test_the_first_that_does_not_fit_is_named(check: Callable[[], None], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check()
