"""Does tracing say where to edit? The same facts, edited at each of some layers, beside what tracing says of these.

Hase et al. 2023 (arXiv 2301.04213), error injection: every fact gets a new object of its relation.
"""

from __future__ import annotations

import copy
import math
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_edit.data.files import read_file
from lit_edit.data.formats import parse_record
from lit_edit.data.request import DataError, EditRequest
from lit_edit.editors.base import Editor
from lit_edit.editors.closed_form.located import LocatedEditor
from lit_edit.files.paths import without_nan
from lit_edit.ledger.edit_ledger import EditLedger, EditRefusedError
from lit_edit.metrics.scoring import score_continuations
from lit_edit.models.adapter import ModelAdapter
from lit_edit.stats.second_moment import KeyStatistics, Progress
from lit_edit.stream.session import EditSession
from lit_edit.studies.tracing.facts import parse_fact

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class LayerEdit:
    """One fact, edited at one layer of the unedited model.

    Attributes:
        fact: Its id.
        layer: The layer, or the one that the edited group lies around.
        effect: Tracing's fraction restored there for this fact.
        before: Probability of the new object on the unedited model (per token, the geometric mean).
        after: The same after the edit; ``None`` if the edit could not be made.
    """

    fact: str
    layer: int
    effect: float
    before: float
    after: float | None

    @property
    def score(self) -> float | None:
        """The rewrite score of what was to be gained."""
        return None if self.after is None else rewrite_score(self.before, self.after)

    def as_dict(self) -> dict[str, Any]:
        """Return the edit as primitives."""
        row: dict[str, Any] = without_nan(asdict(self))
        return row

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> LayerEdit:
        """Restore :meth:`as_dict`."""
        return cls(**row)


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
    subject aside, for a relation.

    Args:
        path: The file that was traced.
        ids: Of the facts, in the order wanted.
        seed: Draws the new objects.

    Raises:
        DataError: If a fact is not in the file, or no fact has a new object.
    """
    found: dict[str, tuple[str, Any]] = {}  # by id: the relation, and the fact
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
        relation = str(record.get("relation_id") or f"{fact.prompt[:start]}{{}}{fact.prompt[end:]}")
        found[fact.id] = relation, fact
        attributes[relation].add(fact.attribute)
    requests = []
    for name in ids:
        if name in ready:
            requests.append(ready[name])
            continue
        if name not in found:
            raise DataError(f"{path} has no fact {name!r}, which was traced; give the file that was traced (--data)")
        relation, fact = found[name]
        others = sorted(attributes[relation] - {fact.attribute})
        if others:
            start, end = fact.span
            prompt = f"{fact.prompt[:start]}{{}}{fact.prompt[end:]}"
            new = random.Random(f"{seed}/{name}").choice(others)
            requests.append(EditRequest(name, prompt, fact.subject, new, target_true=fact.attribute, relation=relation))
    if not requests:
        raise DataError(
            f"{path}: no traced fact has another attribute of its relation to be edited to; give facts with "
            "relation_id, several of a relation, or with target_new"
        )
    return requests


def edit_alone(
    adapter: ModelAdapter,
    tokenizer: PreTrainedTokenizerBase,
    editor: Editor,
    statistics: KeyStatistics,
    requests: Sequence[EditRequest],
    base_hash: str,
    window: int = 16,
    progress: Progress | None = None,
) -> Iterator[tuple[EditRequest, float | None]]:
    """Make each edit as the only one, and yield it with the probability of its new object; ``None``: not made.

    The model is as it was between edits and at the end.

    Args:
        adapter: The unedited model.
        tokenizer: Its tokenizer.
        editor: Fresh, of the layers to edit.
        statistics: Where key statistics come from.
        requests: The edits.
        base_hash: Of the model's weights.
        window: Edits whose targets are fitted together.
        progress: Of the key statistics.
    """
    ledger = EditLedger(adapter, editor.resolve_layers(adapter))
    editor.prepare(ledger, tokenizer, statistics, progress=progress)
    fresh = copy.deepcopy(editor.state_dict())  # preparing anew for each edit would take longer than the edit
    for first in range(0, len(requests), window):
        together = requests[first : first + window]
        prepared = fresh
        if isinstance(editor, LocatedEditor):
            editor.fit_ahead(together)
            prepared = copy.deepcopy(editor.state_dict())
        for request in together:
            try:
                session = EditSession(ledger, editor, "", base_hash)
                session.begin()
                proposal = session.propose([request], [request])
                if proposal is not None:
                    session.apply(proposal)
                yield request, probability(adapter, tokenizer, request)
            except (FloatingPointError, EditRefusedError):
                yield request, None
            finally:
                ledger.restore_base()
                editor.load_state_dict(copy.deepcopy(prepared))
        editor.load_state_dict(copy.deepcopy(fresh))


def probability(adapter: ModelAdapter, tokenizer: PreTrainedTokenizerBase, request: EditRequest) -> float:
    """Return how probable the new object is at the prompt: the geometric mean over its tokens."""
    (score,) = score_continuations(adapter, tokenizer, [(request.text, request.target_new)])
    return math.exp(-score.nll)
