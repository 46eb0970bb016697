"""Whatever is done to one or two models, in whatever order: the weights are W0 plus the edits that hold, or it is said.

A state machine under hypothesis: edits, undo, redo, reset, exports, saved and resumed sessions, streams and copies of
the same models, and between them weights that somebody else writes, in all the ways in which PyTorch lets one. Beside
each model stands what it should be: its own original weights, which edits hold, and what else was written into it.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

import lit_edit
from lit_edit import D4S, EditStream, KeyStatistics, LanguageModel, Session, TargetSettings, WeightsChangedError
from lit_edit.errors import UserError
from lit_edit.export.delta import apply_delta
from lit_edit.models.adapter import ModelAdapter
from lit_edit.testing import tiny_model, tiny_requests, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")

LAYER = 0  # another one is above it: a state in the last layer is read at its own token alone
EDITED = f"model.layers.{LAYER}.mlp.down_proj.weight"
OTHER = "model.layers.1.self_attn.q_proj.weight"


def identity(statistics: KeyStatistics, adapter: ModelAdapter, *args: Any) -> dict[int, Tensor]:
    """Stand for the count of key statistics: the machine makes many models."""
    return {LAYER: torch.eye(adapter.shape(LAYER)[1], dtype=torch.float64)}


def quick() -> D4S:
    """An editor of a few milliseconds whose undo is exact, whose edits do not depend on each other's order."""
    target = TargetSettings(steps=4, kl_factor=0.0)
    return D4S(layers=[LAYER], covariance_weight=1e-2, contexts="plain", keys="base", target=target)


FACTS: Sequence[Mapping[str, Any]] = [
    {"prompt": request.prompt, "subject": request.subject, "target_new": request.target_new}
    for request in tiny_requests()
]


@dataclass
class Known:
    """A model, and what should be true of it."""

    model: PreTrainedModel
    base: dict[str, Tensor]
    session: Session | None = None
    holds: dict[int, int] = field(default_factory=dict)  # number of the edit: index of its fact
    out: dict[int, int] = field(default_factory=dict)
    foreign: set[str] = field(default_factory=set)  # written by somebody else since the ledger looked

    def opened(self, **settings: Any) -> Session:
        """Open the model, and remember its session."""
        self.session = lit_edit.open(self.model, tiny_tokenizer(), quick(), KeyStatistics(), progress=False, **settings)
        return self.session

    def weights(self) -> dict[str, Tensor]:
        """Return a copy of the weights."""
        return {name: value.detach().clone() for name, value in self.model.named_parameters()}


def _assigned(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, nn.Parameter(value, requires_grad=False))


WRITERS: dict[str, Callable[[nn.Module, str, Tensor], object]] = {
    "in place": lambda model, name, value: model.get_parameter(name).copy_(value),
    "through data": lambda model, name, value: model.get_parameter(name).data.copy_(value),
    "one number": lambda model, name, value: model.get_parameter(name).data.view(-1)[7:8].add_(1.0),
    "a new parameter": _assigned,
    "a state dict": lambda model, name, value: model.load_state_dict({**model.state_dict(), name: value}),
}


class Edits(RuleBasedStateMachine):
    """Two models, and all that can be done to them."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="lit-edit-states-"))
        self.saved = 0

    def teardown(self) -> None:
        """Let folders go."""
        for known in self.models:
            if known.session is not None:
                known.session.close()
        shutil.rmtree(self.folder)

    @initialize()
    def begin(self) -> None:
        """Make two models that nobody has touched."""
        self.models = []
        for seed in range(2):
            model = tiny_model(seed=seed, num_hidden_layers=2)
            self.models.append(Known(model, {n: p.detach().clone() for n, p in model.named_parameters()}))

    def _do(self, known: Known, action: Callable[[], Any]) -> bool:
        """Do something; return whether it was done. A model that somebody else has written must refuse, untouched."""
        dirty, before = bool(known.foreign), known.weights()
        if not dirty:
            action()
            return True
        with pytest.raises(WeightsChangedError, match="Three ways on: adopt") as refused:
            action()
        assert known.foreign <= set(refused.value.names)
        assert all(torch.equal(before[name], value) for name, value in known.weights().items())
        return False

    which = st.integers(0, 1)

    # ---- the session -------------------------------------------------------------------------------------------------

    @rule(which=which, fact=st.integers(0, len(FACTS) - 1), again=st.booleans())
    def edit(self, which: int, fact: int, again: bool) -> None:
        known = self.models[which]
        outcomes: list[Any] = []

        def make() -> None:
            if again or known.session is None:
                outcomes.append(
                    lit_edit.edit(
                        known.model, tiny_tokenizer(), [FACTS[fact]], quick(), KeyStatistics(), progress=False
                    )[1]
                )
                known.session = outcomes[0].session
            else:
                outcomes.append(known.session.edit(FACTS[fact]))

        if self._do(known, make):
            for number in [n for n, earlier in known.holds.items() if earlier == fact]:  # replaced
                known.out[number] = known.holds.pop(number)
            known.holds[outcomes[0].numbers[0]] = fact

    @rule(which=which, data=st.data())
    def undo(self, which: int, data: st.DataObject) -> None:
        known = self.models[which]
        if known.session is None or not known.holds:
            return
        number = data.draw(st.sampled_from(sorted(known.holds)))
        if self._do(known, lambda: known.session.undo(number)):
            known.out[number] = known.holds.pop(number)

    @rule(which=which, data=st.data())
    def redo(self, which: int, data: st.DataObject) -> None:
        known = self.models[which]
        if known.session is None or not known.out:
            return
        number = data.draw(st.sampled_from(sorted(known.out)))
        session, fact = known.session, known.out[number]
        if fact in known.holds.values() and not known.foreign:
            with pytest.raises(UserError, match="is of the same fact"):
                session.redo(number)
        elif self._do(known, lambda: session.redo(number)):
            known.holds[number] = known.out.pop(number)

    @rule(which=which)
    def reset(self, which: int) -> None:
        known = self.models[which]
        if known.session is not None and self._do(known, known.session.reset):
            known.holds, known.out = {}, {}

    @rule(which=which)
    def unknown_edits_are_refused(self, which: int) -> None:
        session = self.models[which].session
        if session is not None:
            with pytest.raises(UserError, match="no edit 99 is in the model"):
                session.undo(99)

    # ---- somebody else -----------------------------------------------------------------------------------------------

    @rule(which=which, name=st.sampled_from([EDITED, OTHER]), how=st.sampled_from(sorted(WRITERS)))
    def write(self, which: int, name: str, how: str) -> None:
        known = self.models[which]
        value = known.model.get_parameter(name).detach() + 0.25
        with torch.no_grad():
            WRITERS[how](known.model, name, value)
        if known.session is None:  # nobody has looked yet: that is the model
            known.base = known.weights()
        else:
            known.foreign.add(name)

    @precondition(lambda self: any(known.holds for known in self.models))
    @rule(
        name=st.sampled_from([EDITED, OTHER]),
        how=st.sampled_from(sorted(WRITERS)),
        what=st.sampled_from(["edit", "undo", "redo", "reset", "export", "save_and_resume"]),
        data=st.data(),
    )
    def write_and_go_on(self, name: str, how: str, what: str, data: st.DataObject) -> None:
        """Write into an edited model, and do the next thing at once."""
        which = next(index for index, known in enumerate(self.models) if known.holds)
        self.write(which, name, how)
        more = {"edit": {"fact": 0, "again": False}, "undo": {"data": data}, "redo": {"data": data}}
        getattr(self, what)(which=which, **more.get(what, {}))

    @precondition(lambda self: any(known.foreign for known in self.models))
    @rule(by_opening=st.booleans())
    def adopt(self, by_opening: bool) -> None:
        known = next(known for known in self.models if known.foreign)
        if by_opening:
            known.opened(changed="adopt")
        else:
            known.session.adopt()
        known.base, known.holds, known.out, known.foreign = known.weights(), {}, {}, set()

    @precondition(lambda self: any(known.foreign for known in self.models))
    @rule(by_opening=st.booleans())
    def restore(self, by_opening: bool) -> None:
        known = next(known for known in self.models if known.foreign)

        def put_back() -> None:
            if by_opening:
                known.opened(changed="restore")
            else:
                known.session.restore()

        if OTHER in known.foreign:  # of which no copy is kept
            with pytest.raises(WeightsChangedError, match="load the model again"):
                put_back()
            known.foreign = {OTHER}
        else:
            put_back()
            known.foreign = set()

    # ---- other ways to the same model --------------------------------------------------------------------------------

    @rule(which=which)
    def a_second_stream_is_refused_while_there_are_edits(self, which: int) -> None:
        known = self.models[which]
        if known.session is None or not known.session.ledger.held:
            return
        stream = EditStream(LanguageModel.of(known.model, tiny_tokenizer()), quick(), KeyStatistics())
        with pytest.raises(WeightsChangedError, match="another stream or call"):
            stream.configure_model()

    @rule(which=which, fact=st.integers(0, len(FACTS) - 1), restore=st.booleans())
    def fit(self, which: int, fact: int, restore: bool) -> None:
        """Let a stream edit the model: a session from before must not go on in it, nor a new one take it for W0."""
        known = self.models[which]
        if known.foreign or (known.session is not None and known.session.ledger.held):
            return
        stream = EditStream(LanguageModel.of(known.model, tiny_tokenizer()), quick(), KeyStatistics())
        engine = stream.open()
        proposal = engine.propose([replace(tiny_requests()[fact], id="of the stream")])
        assert proposal is not None
        engine.apply(proposal)
        before = known.weights()
        assert not torch.equal(before[EDITED], known.base[EDITED])
        if known.session is not None:
            with pytest.raises(WeightsChangedError, match="another ledger"):
                known.session.edit(FACTS[fact])
        with pytest.raises(WeightsChangedError, match="another stream or call"):
            known.opened()
        assert all(torch.equal(before[name], value) for name, value in known.weights().items())
        known.opened(changed="restore" if restore else "adopt")
        with pytest.raises(WeightsChangedError, match="another ledger"):
            engine.propose([tiny_requests()[fact]])
        known.base, known.holds, known.out = known.base if restore else before, {}, {}

    @rule(which=which)
    def a_copy_of_an_edited_model_is_refused(self, which: int) -> None:
        known = self.models[which]
        if known.session is None or not known.session.ledger.held:
            return
        copied = copy.deepcopy(known.model)
        with pytest.raises(WeightsChangedError, match="copy of an edited model"):
            lit_edit.open(copied, tiny_tokenizer(), quick(), KeyStatistics(), progress=False)
        lit_edit.open(copied, tiny_tokenizer(), quick(), KeyStatistics(), changed="adopt", progress=False)

    @rule(which=which)
    def export(self, which: int) -> None:
        known = self.models[which]
        if known.session is None or not known.holds:
            return
        self.saved += 1
        path = self.folder / f"{self.saved}.safetensors"
        if not self._do(known, lambda: known.session.export(path, "delta")):
            assert not path.exists()
            return
        fresh = tiny_model(num_hidden_layers=2)
        fresh.load_state_dict(known.base, strict=False)
        apply_delta(fresh, path)
        for name, value in fresh.named_parameters():
            assert torch.equal(value, known.model.get_parameter(name)), name

    @rule(which=which)
    def save_and_resume(self, which: int) -> None:
        known = self.models[which]
        if known.session is None:
            return
        self.saved += 1
        folder = self.folder / f"session{self.saved}"
        if not self._do(known, lambda: known.session.save(folder)):
            return
        known.session.close()
        fresh = tiny_model(num_hidden_layers=2)
        fresh.load_state_dict(known.base, strict=False)
        found = lit_edit.resume(folder, fresh, tiny_tokenizer(), progress=False)
        assert [entry.number for entry in found.ledger.entries] == sorted(known.holds)
        for name, value in fresh.named_parameters():
            torch.testing.assert_close(value, known.model.get_parameter(name), rtol=0, atol=1e-6)
        found.close()

    # ---- what must be true -------------------------------------------------------------------------------------------

    @invariant()
    def the_weights_are_the_original_ones_and_the_edits_that_hold(self) -> None:
        """To the bit by the ledger's own deltas; the numbers of the edits are those that the machine knows."""
        for known in self.models:
            session = known.session
            if session is None or known.foreign:
                continue
            assert [entry.number for entry in session.ledger.entries] == sorted(known.holds)
            for name, value in known.model.named_parameters():
                expected, delta = known.base[name], session.ledger.deltas.get(name)
                if delta is not None:
                    expected = (expected.double() + delta).float()
                assert torch.equal(value, expected), name
            if not known.holds:
                torch.testing.assert_close(
                    known.model.get_parameter(EDITED).detach(), known.base[EDITED], rtol=0, atol=1e-6
                )

    def check_against_a_fresh_model(self) -> None:
        """Compare each model with one on which the edits that hold were made, and nothing else."""
        for known in self.models:
            if known.session is None or known.foreign or not known.holds:
                continue
            fresh = tiny_model(num_hidden_layers=2)
            fresh.load_state_dict(known.base, strict=False)
            facts = [FACTS[known.holds[number]] for number in sorted(known.holds)]
            lit_edit.edit(fresh, tiny_tokenizer(), facts, quick(), KeyStatistics(), window=1, progress=False)
            torch.testing.assert_close(
                known.model.get_parameter(EDITED).detach(), fresh.get_parameter(EDITED).detach(), rtol=0, atol=1e-5
            )


class CheckedEdits(Edits):
    """The same, and at the end of each sequence a comparison with a fresh model."""

    def teardown(self) -> None:
        """Compare, then let folders go."""
        try:
            self.check_against_a_fresh_model()
        finally:
            super().teardown()


def run(sequences: int) -> None:
    chosen = settings(
        max_examples=sequences,
        stateful_step_count=20,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeyStatistics, "compute", identity)
        run_state_machine_as_test(CheckedEdits, settings=chosen)


def test_no_sequence_leaves_other_weights_without_an_error() -> None:
    run(25)


@pytest.mark.slow
def test_no_sequence_of_two_thousand_leaves_other_weights_without_an_error() -> None:
    run(2000)
