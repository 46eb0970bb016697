"""Methods whose solver several ranks share: all ranks have the same weights, those of one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from lit_edit.devices.ranks import Ranks
from lit_edit.editors import MEMIT, Editor, LoRA, SimIE
from lit_edit.editors.base import commit_proposal
from lit_edit.ledger.edit_ledger import EditLedger
from lit_edit.models.adapter import ModelAdapter
from lit_edit.testing import tiny_model, tiny_requests, tiny_tokenizer
from tests.editors.closed_form.test_closed_forms import ENGINE, editor_of, moment_of
from tests.ranks.together import Found, together

REQUESTS = tiny_requests()
ROWS = ("alphaedit", "rome", "pmet", "nse", "simie", "lora")  # those with solvers and states of their own
OTHERS: dict[str, Callable[[], Editor]] = {
    "simie": lambda: SimIE(MEMIT(layers=[1, 2], covariance_weight=5.0, **ENGINE), 2.0),
    "lora": lambda: LoRA(layers=[1, 2], steps=3),
}


def make(row: str) -> Editor:
    return OTHERS[row]() if row in OTHERS else editor_of(row)


def edit(ranks: Ranks, row: str) -> Found:
    """Three edits, one of which is taken out and put back; then on from the leader's state."""
    adapter = ModelAdapter(tiny_model("gpt2", torch.float64))
    adapter.ranks = replace(ranks, alike=False)
    editor = make(row)
    ledger = EditLedger(adapter, editor.resolve_layers(adapter))
    moments = {layer: moment_of(layer, adapter.shape(layer)[1]) for layer in ledger.layers}
    editor.prepare(ledger, tiny_tokenizer(), moments)  # type: ignore[arg-type]
    found: Found = {}

    def note(when: str) -> None:
        for layer, name in ledger.names.items():
            found[f"{when} {layer}"] = ledger.deltas[name].clone()
            found[f"{when} weight {layer}"] = adapter.weight(layer).detach().clone()

    for number in range(3):
        commit_proposal(ledger, editor, editor.propose(REQUESTS[number : number + 1]))
        note(f"edit {number}")
    commit_proposal(ledger, editor, editor.retract(ledger.facts_of([2])))
    note("undone")
    commit_proposal(ledger, editor, editor.reinstate(ledger.facts_of([2])))
    note("redone")
    return found


@pytest.mark.parametrize("row", ROWS)
def test_all_ranks_edit_as_one_process_does(row: str) -> None:
    (alone,) = together(1, edit, row)
    first, second = together(2, edit, row)
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]) or "weight" not in name
        torch.testing.assert_close(first[name], second[name], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(first[name], value, rtol=1e-7, atol=1e-9)
    assert any(float(value.norm()) > 1e-3 for value in alone.values())
