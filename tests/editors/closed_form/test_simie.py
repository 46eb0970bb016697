"""SimIE against its recursion as published, with dense matrices, and what every editor must do."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_edit import D4S
from lit_edit.editors import MEMIT, ROME, SimIE
from lit_edit.errors import ArgumentError
from lit_edit.stream.session import EditSession
from lit_edit.testing import tiny_model, tiny_requests, tiny_tokenizer
from lit_edit.text.tokens import continuation
from tests.editors.closed_form.test_closed_forms import ENGINE, deltas, distance, make, open_session

F64, REQUESTS = torch.float64, tiny_requests()


def start(alpha: float = 2.0, layers: Sequence[int] = (1,), base: Any = None, **options: Any) -> EditSession:
    base = base or MEMIT(layers=list(layers), covariance_weight=5.0, **ENGINE)
    return open_session(SimIE(base, alpha), **options)  # type: ignore[arg-type]


def single(number: int) -> Tensor:
    """The base editor's update of an edit, made on an unedited model."""
    session = open_session(MEMIT(layers=[1], covariance_weight=5.0, **ENGINE))
    return deltas(make(session, REQUESTS[number : number + 1]))[0]


@pytest.mark.parametrize("batch", [1, 2])
def test_simie_is_the_published_recursion(batch: int) -> None:
    model = tiny_model("gpt2", F64)
    module: Any = model.transformer.h[1].mlp.c_proj
    wanted, moment = torch.zeros(module.weight.T.shape, dtype=F64), 2.0 * torch.eye(module.weight.shape[0], dtype=F64)
    for first in range(0, 4, batch):
        said, heard = [], []
        for number in range(first, first + batch):
            found: list[Tensor] = []
            handle = module.register_forward_pre_hook(lambda _, inputs, found=found: found.append(inputs[0][0]))
            prompt, target = continuation(tiny_tokenizer(), REQUESTS[number].text, REQUESTS[number].target_new)
            model(torch.tensor([prompt + target]))
            handle.remove()
            heard.append(found[0].T)
            said.append(single(number) @ found[0].T)
        keys = torch.cat(heard, 1)
        moment = moment + keys @ keys.T
        wanted = wanted + (torch.cat(said, 1) - wanted @ keys) @ keys.T @ torch.linalg.inv(moment)
    (delta,) = deltas(make(start(), REQUESTS[:4], batch))
    assert distance(delta, wanted) < 1e-9


def test_the_model_may_be_moved_between_two_edits() -> None:
    session = make(start(dtype=torch.float32, layers=[1, 2]), REQUESTS[:1])
    session.ledger.adapter.model.to(torch.bfloat16)
    session.ledger.align()
    make(session, REQUESTS[1:2])
    assert len(session.ledger) == 2


def test_a_base_for_single_edits_takes_larger_steps() -> None:
    steps = make(start(base=ROME(layers=[1], **ENGINE)), REQUESTS[:4], 2)
    singles = make(start(base=ROME(layers=[1], **ENGINE)), REQUESTS[:4], 1)
    assert distance(deltas(steps)[0], deltas(singles)[0]) < 1e-9


def test_the_base_editor_always_starts_from_the_original_weights() -> None:
    whole = make(start(layers=[1, 2]), REQUESTS[:3])
    facts = whole.ledger.facts_of([3])[0].tensors
    alone = make(start(layers=[1, 2]), REQUESTS[2:3])
    known = alone.ledger.facts_of([1])[0].tensors
    assert all(torch.equal(facts[name], known[name]) for name in known)


def test_a_vanishing_prior_says_what_the_base_editor_says() -> None:
    session = make(start(alpha=1e-10), REQUESTS[:1])
    facts = session.ledger.facts_of([1])[0].tensors
    torch.testing.assert_close(deltas(session)[0] @ facts["keys.1"], facts["residuals.1"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("batch", [1, 2])
def test_taking_out_is_exact(batch: int) -> None:
    session = make(start(layers=[1, 2]), REQUESTS[:4], batch)
    before = deltas(session)
    session.undo([2])
    never = make(start(layers=[1, 2]), [REQUESTS[0], *REQUESTS[2:4]])
    assert all(distance(a, b) < 1e-9 for a, b in zip(deltas(session), deltas(never), strict=True))
    session.redo([2])
    assert all(distance(a, b) < 1e-9 for a, b in zip(deltas(session), before, strict=True))
    session.undo([1, 2, 3, 4])
    assert all(float(delta.norm()) == 0 for delta in deltas(session))


@pytest.mark.parametrize("base", ["memit", "d4s", "rome"])
def test_a_journal_and_a_state_are_taken_up_bit_for_bit(base: str, tmp_path: Path) -> None:
    def begin(journal: Path | None = None) -> EditSession:
        kinds: dict[str, Any] = {
            "memit": lambda: MEMIT(layers=[1, 2], **ENGINE),
            "d4s": lambda: D4S(layers=[1, 2], **ENGINE),
            "rome": lambda: ROME(layers=[1], **ENGINE),
        }
        return start(base=kinds[base](), journal=journal)

    whole = make(begin(tmp_path / "journal"), REQUESTS[:4])
    again = begin(tmp_path / "journal")
    again.repeat_all()
    assert all(torch.equal(a, b) for a, b in zip(deltas(again), deltas(whole), strict=True))
    cut, other = make(begin(), REQUESTS[:2]), begin()
    other.ledger.load_state_dict(deepcopy(cut.ledger.state_dict()))
    state = deepcopy(cut.editor.state_dict())
    other.editor.check_state(state, other.ledger.layers)
    other.editor.load_state_dict(state)
    make(other, REQUESTS[2:4])
    assert all(torch.equal(a, b) for a, b in zip(deltas(other), deltas(whole), strict=True))


def test_an_edit_replaces_an_earlier_one() -> None:
    session = make(start(), REQUESTS[:2])
    make(session, [replace(REQUESTS[0], id="again", target_new="Paris")])
    assert [entry.number for entry in session.ledger.entries] == [2, 3]


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="alpha"):
        SimIE(MEMIT(), 0.0)
    with pytest.raises(ValueError, match="single edits"):
        SimIE(SimIE(MEMIT()))
    other = make(open_session(MEMIT(layers=[1], **ENGINE)), REQUESTS[:1])
    with pytest.raises(ArgumentError, match="another editing method"):
        start().editor.check_state(other.editor.state_dict(), [1])
