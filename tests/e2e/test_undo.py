"""Undo and conflicts on the real model: what is taken out is as if it had never been, and what stays, stays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from lit_edit import D4S, EditRequest, KeyStatistics, LanguageModel, TargetSettings
from lit_edit.data.sources import load_requests
from lit_edit.ledger.edit_ledger import EditLedger
from lit_edit.metrics.evaluation import evaluate_edits
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.generation import continue_greedily
from lit_edit.stream.session import EditSession

pytestmark = [pytest.mark.model, pytest.mark.slow]
EDITS = 30
TURBO = TargetSettings(rule="polyak", precision="fastest", probability=0.95)


@pytest.fixture(scope="module")
def requests(shared_data: Path) -> list[EditRequest]:
    return load_requests("file", str(shared_data / "counterfact_2000.json"), EDITS)[0]


def start(targets: dict[str, Any] | None = None, **settings: object) -> EditSession:
    """Begin on a model of its own: a ledger takes the weights it finds for the original ones."""
    model, tokenizer = LanguageModel("smollm2-135m").load()
    adapter = ModelAdapter(model)
    editor = D4S(target=TURBO, context_count=2, **settings)
    ledger = EditLedger(adapter, editor.resolve_layers(adapter))
    editor.prepare(ledger, tokenizer, KeyStatistics(tokens=20_000))
    editor.targets = dict(targets or {})
    session = EditSession(ledger, editor, "smollm2-135m", "of this test")
    session.begin()
    return session


def make(session: EditSession, requests: Sequence[EditRequest]) -> None:
    """Make edits one by one, each with its target fitted alone: a window's other members bear on its round-off."""
    for request in requests:
        proposal = session.propose([request], [request])
        assert proposal is not None
        session.apply(proposal)


def weights(session: EditSession) -> dict[int, Tensor]:
    return {layer: session.ledger.adapter.own_weight(layer).detach().clone() for layer in session.ledger.layers}


def said(session: EditSession, requests: Sequence[EditRequest], original: bool = False) -> list[tuple[int, ...]]:
    """What the model says first at the edits' prompts."""
    adapter = session.ledger.original() if original else session.ledger.adapter
    return [result.efficacy[0].choice for result in evaluate_edits(adapter, session.editor.tokenizer, requests)]


def says(session: EditSession, request: EditRequest, answer: str) -> bool:
    return (
        continue_greedily(session.ledger.adapter, session.editor.tokenizer, request.text, 4).strip().startswith(answer)
    )


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(scope="module")
def targets(requests: list[EditRequest]) -> dict[str, Any]:
    """Fitted once for all streams: a target depends on the unedited model and on nothing else."""
    session = start(keys="base")
    session.editor.propose(requests[:1], requests)
    return dict(session.editor.targets)


@pytest.fixture(scope="module")
def edited(requests: list[EditRequest], targets: dict[str, Any]) -> EditSession:
    session = start(targets, keys="base")
    make(session, requests)
    return session


@pytest.mark.parametrize("places", [[16], [0, 11, 29], [1, 3, 4, 8, 13, 17, 20, 22, 25, 28]], ids=["1", "3", "10"])
def test_undo_equals_a_stream_without_the_edits(
    edited: EditSession, requests: list[EditRequest], targets: dict[str, Any], places: list[int]
) -> None:
    ledger = edited.ledger
    assert edited.editor.exact_undo
    whole, deltas = weights(edited), dict(ledger.deltas)
    base, told = said(edited, requests, original=True), said(edited, requests)
    edited.undo([place + 1 for place in places])
    without, now = weights(edited), said(edited, requests)
    edited.redo([place + 1 for place in places])
    for layer, weight in weights(edited).items():
        assert off(weight, whole[layer]) < 1e-6
        assert off(ledger.deltas[ledger.names[layer]], deltas[ledger.names[layer]]) < 1e-10

    never = start(targets, keys="base")
    make(never, [request for place, request in enumerate(requests) if place not in places])
    for layer, weight in weights(never).items():
        base_weight = ledger.base[ledger.names[layer]]
        assert off(without[layer], weight) < 1e-6
        assert off(without[layer] - base_weight, weight - base_weight) < 1e-5  # of the update, not of the weight
        assert off(without[layer], whole[layer]) > 1e-4  # and the edits had changed something
    back = [now[place] == base[place] for place in places]
    kept = [now[place] == told[place] for place in range(EDITS) if place not in places]
    assert all(told[place] != base[place] for place in places)
    assert sum(back) >= len(back) - len(back) // 10
    assert sum(kept) >= len(kept) - 1


def test_undo_equals_a_stream_that_fits_its_own_targets(requests: list[EditRequest]) -> None:
    few = requests[:6]
    session, never = start(keys="base"), start(keys="base")
    make(session, few)
    session.undo([2])
    make(never, [few[0], *few[2:]])
    for layer, weight in weights(never).items():
        assert off(session.ledger.adapter.own_weight(layer), weight) < 1e-6


def test_exact_undo_of_the_default_settings(requests: list[EditRequest], targets: dict[str, Any]) -> None:
    """Keys read on a model that other edits have changed: plain undo is near, --exact is there."""
    few = requests[:8]
    never = start(targets)
    make(never, [r for i, r in enumerate(few) if i != 2])
    expected, deltas = weights(never), dict(never.ledger.deltas)
    for exact, bound in ((False, 0.05), (True, 1e-5)):  # of the updates; round-off is float32
        session = start(targets)
        make(session, few)
        estimate = session.editor.deviation(session.editor.retract(session.ledger.facts_of([3])))
        session.undo([3], exact=exact)
        true = max(off(delta, deltas[name]) for name, delta in session.ledger.deltas.items())
        assert true < bound
        if exact:
            assert max(off(weight, expected[layer]) for layer, weight in weights(session).items()) < 1e-6
        else:
            assert true > 1e-6
            assert true < 3 * estimate  # what lit-edit says of it is of the right size


@pytest.mark.parametrize(
    "second", ["The mother tongue of {} is", "the mother tongue of {}  is", "The mother tongue of {} was"]
)
def test_the_second_answer_counts(second: str) -> None:
    name = "Danielle Darrieux"
    session = start()
    first = EditRequest("1", "The mother tongue of {} is", name, "English")
    make(session, [first])
    assert says(session, first, "English")
    make(session, [EditRequest("2", second, name, "Dutch")])
    assert says(session, first, "Dutch")
    assert "the same fact" in session.ledger.history.undone[1]
    alone = start()
    make(alone, [EditRequest("2", second, name, "Dutch")])
    for layer, weight in weights(alone).items():
        assert off(session.ledger.adapter.own_weight(layer), weight) < 1e-6
