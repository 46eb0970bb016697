"""The names that papers give to what a summary holds; the same word means different things in two of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lit_edit.errors import check_known

ProtocolName = Literal["counterfact", "zsre_kmeng", "zsre_easyedit"]

PUBLISHED: dict[str, dict[str, tuple[str, ...]]] = {
    "counterfact": {
        "ES": ("efficacy", "success"),
        "PS": ("generalization", "success"),
        "NS": ("locality", "success"),
        "EM": ("efficacy", "magnitude"),
        "PM": ("generalization", "magnitude"),
        "NM": ("locality", "magnitude"),
        "S": ("score",),
        "GE": ("fluency",),
        "RS": ("consistency",),
    },
    "zsre_kmeng": {
        "efficacy": ("efficacy", "token_accuracy"),
        "paraphrase": ("generalization", "token_accuracy"),
        "locality": ("locality", "token_accuracy"),  # against the gold answer: low before any edit
    },
    "zsre_easyedit": {
        "rewrite_acc": ("efficacy", "token_accuracy"),
        "rephrase_acc": ("generalization", "token_accuracy"),
        "locality": ("locality", "agreement"),  # against the model before editing: 100 before any edit
    },
}
"""By protocol, the published name of a number and where it stands in a summary."""


def as_published(summary: Mapping[str, Any], protocol: ProtocolName) -> dict[str, float | None]:
    """Return a stage of a summary (``summary["final"]``) under the names of one protocol, times 100 as tables show it.

    ``locality`` of ``zsre_kmeng`` (ROME, MEMIT, AlphaEdit) is the accuracy on the gold answer of an unrelated question,
    some 25 to 33 for an unedited model; that of ``zsre_easyedit`` is the agreement with the model before editing,
    near 100. They must not stand in one table. What was not measured is ``None``.

    Raises:
        ValueError: If there is no such protocol.

    Example:
        >>> stage = {"locality": {"token_accuracy": 0.25, "agreement": 1.0}}
        >>> as_published(stage, "zsre_kmeng")["locality"], as_published(stage, "zsre_easyedit")["locality"]
        (25.0, 100.0)
    """
    check_known(PUBLISHED, protocol=protocol)
    found: dict[str, float | None] = {}
    for name, path in PUBLISHED[protocol].items():
        value: Any = summary
        for step in path:
            value = None if value is None else value.get(step)
        found[name] = None if value is None else 100 * float(value)
    return found
