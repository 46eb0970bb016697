"""The edits that candidates are tried on, and those that none has seen before the end."""

from __future__ import annotations

import random
from collections.abc import Sequence

from lit_edit.data.request import DataError, EditRequest


def draw_samples(
    requests: Sequence[EditRequest], edits: int, held_out: int, seed: int
) -> tuple[list[EditRequest], list[EditRequest]]:
    """Draw two samples that share no fact and no subject: to choose by, and to compare choice and default on.

    Only requests count of which all of efficacy, generalization and locality can be measured, and the first of each
    subject.
    """
    usable = [r for r in requests if r.target_true and r.paraphrases and r.neighborhood]
    found = list(reversed({r.subject.strip(): r for r in reversed(usable)}.values()))
    if len(found) < edits + held_out:
        raise DataError(
            f"--limit {edits} and --held-out {held_out} need {edits + held_out} records of different subjects, each "
            f"with target_true, paraphrases and neighborhood; there are {len(found)} such among {len(requests)}: ask "
            "for fewer, or give more data"
        )
    drawn = random.Random(seed).sample(found, edits + held_out)
    return drawn[:edits], drawn[edits:]
