"""Whatever is done in whatever order, crashes included: each weight is cast(W0 + D(edits that hold))."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from lit_edit import EditRequest, TargetSettings
from lit_edit.editors.closed_form.facts import Facts
from lit_edit.ledger.journal import Journal
from lit_edit.stream.session import EditSession
from lit_edit.testing import tiny_model, tiny_requests
from tests.stream.test_session import checkpoint_of, make, stream_of

QUICK = {"target": TargetSettings(steps=2), "contexts": "plain"}
MODES = {"base": torch.float32, "walked": torch.float64, "memit": torch.float32, "single": torch.float64}
PRIOR = 5.0  # times the identity: what the statistics of these tests are
WORDS = ("bread", "chess", "Berlin", "Latin", "Peru")


@cache
def base_weights(dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tiny_model("llama", dtype).named_parameters()}


def request(number: int) -> EditRequest:
    """The next edit of an endless stream; no two are of one fact."""
    base = tiny_requests()[number % 6]
    return EditRequest(f"e{number}", base.prompt, f"{WORDS[number // 6 % 5]} {base.subject} {number}", base.target_new)


def naive(journal: Journal, live: set[int], memory: bool) -> dict[int, Tensor]:
    """The solution of the facts that hold, read from the file alone, by the textbook formula.

    Args:
        journal: The records.
        live: Numbers of the edits that hold.
        memory: All facts are one problem; else each block is one, and they are added up.
    """
    place: dict[int, tuple[int, int]] = {}
    for index, record in enumerate(journal.records):
        if record.get("facts"):
            numbers = [*(entry["number"] for entry in record["entries"]), *record["rewritten"]]
            place |= {number: (index, column) for column, number in enumerate(numbers)}
    blocks: list[list[tuple[int, int]]] = []
    for index in sorted({place[number][0] for number in live}):
        sizes = journal.tensors(index)["blocks"].tolist()
        owner = [block for block, size in enumerate(sizes) for _ in range(size)]
        columns = [column for at, column in (place[number] for number in sorted(live)) if at == index]
        blocks += [[(index, c) for c in columns if owner[c] == block] for block in sorted({owner[c] for c in columns})]
    problems = [[place for block in blocks for place in block]] if memory and blocks else blocks
    found: dict[int, Tensor] = {}
    for problem in problems:
        facts = {index: Facts.from_tensors(journal.tensors(index), torch.device("cpu")) for index, _ in problem}
        for layer in next(iter(facts.values())).keys:
            keys = torch.stack([facts[index].keys[layer][:, column] for index, column in problem], 1)
            residuals = torch.stack([facts[index].residuals[layer][:, column] for index, column in problem], 1)
            inverse = torch.linalg.inv(PRIOR * torch.eye(len(keys), dtype=torch.float64) + keys @ keys.T)
            found[layer] = found.get(layer, torch.zeros(())) + residuals @ keys.T @ inverse
    return found


class Ledger(RuleBasedStateMachine):
    """A session, what its history should be, and a disk that keeps the journal."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "journal"
        self.live: set[int] = set()
        self.gone: set[int] = set()
        self.saved: list[tuple[int, dict[str, Any]]] = []
        self.history: list[tuple[int, frozenset[int], frozenset[int]]] = []  # after each record: bytes, live, gone
        self.session: EditSession | None = None

    def teardown(self) -> None:
        self.folder.cleanup()

    @initialize(mode=st.sampled_from(sorted(MODES)))
    def begin(self, mode: str) -> None:
        self.mode, self.dtype = mode, MODES[mode]
        self.reopen(None)

    def reopen(self, saved: dict[str, Any] | None) -> None:
        """Another process opens the same file."""
        self.stream = stream_of(self.mode, self.dtype, self.path, settings=QUICK)
        self.session = self.stream.open(saved)
        self.note()

    def note(self) -> None:
        size = self.path.stat().st_size
        if not self.history or size > self.history[-1][0]:
            self.history.append((size, frozenset(self.live), frozenset(self.gone)))

    @property
    def made(self) -> int:
        return len(self.live) + len(self.gone)

    # ---- what may be done -------------------------------------------------------------------------------------------

    @rule(count=st.integers(1, 2))
    def commit(self, count: int) -> None:
        step = [request(self.made + i) for i in range(count)]
        self.live |= set(range(self.made + 1, self.made + 1 + count))
        make(self.session, step, count)
        self.note()

    @precondition(lambda self: self.live)
    @rule(data=st.data(), exact=st.booleans())
    def undo(self, data: st.DataObject, exact: bool) -> None:
        out = data.draw(st.lists(st.sampled_from(sorted(self.live)), min_size=1, max_size=3, unique=True))
        self.session.undo(out, exact=exact)
        self.live -= set(out)
        self.gone |= set(out)
        self.note()

    @precondition(lambda self: self.gone)
    @rule(data=st.data())
    def redo(self, data: st.DataObject) -> None:
        back = data.draw(st.lists(st.sampled_from(sorted(self.gone)), min_size=1, max_size=3, unique=True))
        self.session.redo(back)
        self.gone -= set(back)
        self.live |= set(back)
        self.note()

    @rule()
    def save(self) -> None:
        self.saved.append((self.path.stat().st_size, checkpoint_of(self.stream)))

    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        """The process dies and the file loses its end, perhaps in the middle of a record."""
        size = self.path.stat().st_size
        kept = max(size - data.draw(st.integers(0, 30_000)), self.history[0][0])
        os.truncate(self.path, kept)
        self.history = [past for past in self.history if past[0] <= kept]
        _, live, gone = self.history[-1]
        self.live, self.gone = set(live), set(gone)
        self.saved = [(at, state) for at, state in self.saved if at <= kept]
        usable = [state for at, state in self.saved if at <= self.history[-1][0]]
        before = None if kept < size else weights(self.session)
        self.reopen(data.draw(st.sampled_from([None, *usable])) if usable else None)
        if before is not None:  # nothing was lost: the very same bits
            assert all(torch.equal(a, b) for a, b in zip(before, weights(self.session), strict=True))

    # ---- what must hold ---------------------------------------------------------------------------------------------

    @invariant()
    def history_is_as_it_should_be(self) -> None:
        if self.session is None:
            return
        history = self.session.ledger.history
        assert {entry.number for entry in history.live} == self.live
        assert set(history.undone) == self.gone
        assert len(history.made) == self.made
        assert sorted(self.session.editor.known.numbers) == sorted(self.live)

    @invariant()
    def weights_are_the_cast_sum(self) -> None:
        if self.session is None:
            return
        ledger = self.session.ledger
        base = base_weights(self.dtype)
        for name, value in ledger.adapter.model.named_parameters():
            delta = ledger.deltas.get(name)
            expected = base[name] if delta is None else (base[name].double() + delta).to(self.dtype)
            assert torch.equal(value, expected), name
        assert set(ledger.deltas) <= set(ledger.names.values())

    @invariant()
    def updates_are_the_solution_of_the_facts_that_hold(self) -> None:
        if self.session is None:
            return
        ledger = self.session.ledger
        assert ledger.position == len(ledger.journal)
        expected = naive(Journal(self.path, writable=False), self.live, memory=self.mode != "memit")
        for layer, name in ledger.names.items():
            delta = ledger.deltas.get(name, torch.zeros(ledger.adapter.shape(layer), dtype=torch.float64))
            torch.testing.assert_close(delta, expected.get(layer, torch.zeros_like(delta)), rtol=1e-8, atol=1e-8)
            solved = self.session.editor.solvers[layer].delta
            torch.testing.assert_close(solved, delta, rtol=1e-8, atol=1e-10)


def weights(session: EditSession) -> Sequence[Tensor]:
    return [session.ledger.adapter.own_weight(layer).clone() for layer in session.ledger.layers]


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of short journals need not reach the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


TestLedger = Ledger.TestCase
TestLedger.settings = settings(
    max_examples=25,
    stateful_step_count=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
