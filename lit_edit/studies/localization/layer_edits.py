"""Does tracing say where to edit? The same facts, edited at each of some layers, beside what tracing says of these.

Hase et al. 2023 (arXiv 2301.04213), error injection: every fact gets a new object of its relation.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_edit.data.files import read_file
from lit_edit.data.formats import parse_record
from lit_edit.data.request import DataError, EditRequest
from lit_edit.metrics.scoring import score_continuations
from lit_edit.models.adapter import ModelAdapter
from lit_edit.studies.alone import SingleEdits
from lit_edit.studies.tracing.facts import parse_fact

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class LayerEdit:
    """One fact, edited at one layer of the unedited model."""

    fact: str  # its id
    layer: int  # or the one that the edited group lies around
    effect: float  # tracing's fraction restored there for this fact
    before: float  # probability of the new object on the unedited model (per token, the geometric mean)
    after: float | None  # the same after the edit; None if the edit could not be made

    @property
    def score(self) -> float | None:
        """The rewrite score of what was to be gained."""
        return None if self.after is None else rewrite_score(self.before, self.after)


def rewrite_score(before: float, after: float) -> float:
    r"""Return :math:`\max(0, 1 - (1 - p_{after}) / (1 - p_{before}))`, the share gained of what there was to gain.

    Example:
        >>> rewrite_score(0.2, 0.6), rewrite_score(0.2, 0.1), rewrite_score(1.0, 1.0)
        (0.5, 0.0, 0.0)
    """
    return max(0.0, 1 - (1 - after) / (1 - before)) if before < 1 else 0.0


def requests_of(path: Path, ids: Sequence[str], seed: int) -> list[EditRequest]:
    """Return an edit per traced fact: of a record's own new object, or of another fact's attribute in its relation.

    Facts whose relation has no other attribute are left out. A record without ``relation_id`` has its prompt, the
    subject aside, for a relation. Edits are in the order of ``ids``; the seed draws the new objects.

    Raises:
        DataError: If a fact is not in the file, or no fact has a new object.
    """
    found: dict[str, tuple[str, str, Any]] = {}  # by id: the relation, the prompt without the subject, and the fact
    ready: dict[str, EditRequest] = {}
    attributes: dict[str, set[str]] = defaultdict(set)
    for number, (_, record) in enumerate(read_file(path)):
        if isinstance(record, DataError):
            raise record
        fact = parse_fact(record, number)
        if "attribute" not in record:
            ready[fact.id] = parse_record(record, number)
            continue
        start, end = fact.span
        prompt = f"{fact.prompt[:start]}{{}}{fact.prompt[end:]}"
        relation = str(record.get("relation_id") or prompt)
        found[fact.id] = relation, prompt, fact
        attributes[relation].add(fact.attribute)
    requests = []
    for name in ids:
        if name in ready:
            requests.append(ready[name])
            continue
        if name not in found:
            raise DataError(f"{path} has no fact {name!r}, which was traced; give the file that was traced (--data)")
        relation, prompt, fact = found[name]
        others = sorted(attributes[relation] - {fact.attribute})
        if others:
            new = random.Random(f"{seed}/{name}").choice(others)
            requests.append(EditRequest(name, prompt, fact.subject, new, target_true=fact.attribute, relation=relation))
    if not requests:
        raise DataError(
            f"{path}: no traced fact has another attribute of its relation to be edited to; give facts with "
            "relation_id, several of a relation, or with target_new"
        )
    return requests


def edit_alone(
    edits: SingleEdits, requests: Sequence[EditRequest], window: int = 16
) -> Iterator[tuple[EditRequest, float | None]]:
    """Make each edit as the only one, and yield it with the probability of its new object; ``None``: not made.

    So many targets as are in a window are fitted together.
    """
    for first in range(0, len(requests), window):
        together = requests[first : first + window]
        edits.fit_ahead(together)
        for request in together:
            with edits.made(request) as refused:
                yield request, None if refused else probability(edits.adapter, edits.tokenizer, request)


def probability(adapter: ModelAdapter, tokenizer: PreTrainedTokenizerBase, request: EditRequest) -> float:
    """Return how probable the new object is at the prompt: the geometric mean over its tokens."""
    (score,) = score_continuations(adapter, tokenizer, [(request.text, request.target_new)])
    return math.exp(-score.nll)
