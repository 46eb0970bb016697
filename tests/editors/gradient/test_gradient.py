"""Fine-tuning editors: parity with a plain loop, the ball of FT-L, undo, journals, checkpoints, divergence."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_edit import EditRequest, EditStream, LanguageModel, edit
from lit_edit.data.request import DataError
from lit_edit.data.sources import builtin_text, load_requests
from lit_edit.editors.gradient.engine import GradientEditor
from lit_edit.editors.gradient.ft import FT, FTL, FTM
from lit_edit.editors.gradient.saul import SAUL, draw_facts
from lit_edit.editors.transforms.base import UpdateTransform
from lit_edit.errors import ArgumentError
from lit_edit.ledger.edit_ledger import EditRefusedError
from lit_edit.models.adapter import ModelAdapter
from lit_edit.stream.session import EditSession
from lit_edit.testing import tiny_model, tiny_requests, tiny_tokenizer
from lit_edit.text.tokens import continuation, encode
from tests.streams import FixedStatistics
from tests.tolerances import SINGLE

REQUESTS = tiny_requests()
F32, F64 = torch.float32, torch.float64
# Norms, or attention, compute in float32 whatever the model's type is; not GPT-2's. Adam, which divides by a gradient's
# own size, magnifies it; a step is 1e-2.
FAMILIES = {"gpt2": 1e-9, "gptj": 2 * SINGLE, "llama": 2 * SINGLE, "gemma2": 2 * SINGLE}
Make = Callable[..., GradientEditor]
METHODS: dict[str, Make] = {
    "FT": lambda **o: FT(**{"layers": [1, 2], "steps": 4, "lr": 1e-2, **o}),
    "FTL": lambda **o: FTL(**{"layers": [1, 2], "steps": 4, "lr": 1e-2, "epsilon": 0.015, **o}),
    "FTM": lambda **o: FTM(**{"layers": [1, 2], "steps": 4, "lr": 1e-2, **o}),
    "SAUL": lambda **o: SAUL(**{"layers": [1, 2], "steps": 4, "lr": 1e-2, "augmented": 1, **o}),
}
every_method = pytest.mark.parametrize("method", METHODS)


def start(editor: GradientEditor, model: PreTrainedModel | None = None, journal: Path | None = None) -> EditSession:
    language_model = LanguageModel.of(model or tiny_model("llama", F64), tiny_tokenizer())
    file = None if journal is None else str(journal)
    return EditStream(language_model, editor, FixedStatistics(), journal=file).open()


def make(session: EditSession, requests: Sequence[EditRequest], batch: int = 1) -> EditSession:
    for first in range(0, len(requests), batch):
        proposal = session.propose(requests[first : first + batch], requests[first : first + batch])
        assert proposal is not None
        session.apply(proposal)
    return session


def weights(session: EditSession) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in session.ledger.adapter.model.named_parameters()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# ---- parity ----------------------------------------------------------------------------------------------------------


def naive_loss(model: PreTrainedModel, editor: GradientEditor, request: EditRequest) -> Tensor:
    """The loss of one edit by passes of the model's own, one row at a time."""
    tokenizer = tiny_tokenizer()
    if isinstance(editor, SAUL):
        key = f"{request.id}\x1f{request.text}\x1f{request.target_new}"
        facts = draw_facts(editor.random_facts, request.subject, 2, editor.seed, key)
        rows = [f"{request.text} {request.target_new}. {facts[0]}", facts[1]]
        nlls = []
        for row in rows:
            ids = torch.tensor([encode(tokenizer, row)])
            logp = model(input_ids=ids).logits[0].log_softmax(-1)
            nlls += [-logp[i - 1, ids[0, i]] for i in range(1, ids.shape[1])]
        return torch.stack(nlls).mean()
    prompt, target = continuation(tokenizer, request.text, request.target_new)
    logp = model(input_ids=torch.tensor([[*prompt, *target]])).logits[0].log_softmax(-1)
    last = len(prompt) - 1
    at_once = isinstance(editor, FT) and editor.loss == "prompt_last"
    return torch.stack([-logp[last if at_once else last + i, word] for i, word in enumerate(target)]).mean()


def naive(model: PreTrainedModel, editor: GradientEditor, steps: Sequence[Sequence[EditRequest]]) -> dict[str, Tensor]:
    """Plain fine-tuning of a copy of the model, weights moved in place."""
    adapter = ModelAdapter(copy.deepcopy(model))
    leaves = {adapter.weight_name(n): adapter.own_weight(n) for n in editor.resolve_layers(adapter)}
    origin = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.requires_grad_(True)
    for requests in steps:
        adam = torch.optim.Adam(leaves.values(), lr=editor.lr)
        for _ in range(editor.steps):
            loss = torch.stack([naive_loss(adapter.model, editor, r) for r in requests]).mean()
            if loss < editor.loss_threshold:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
            if isinstance(editor, FTL):
                with torch.no_grad():
                    for name, leaf in leaves.items():
                        leaf.copy_(leaf.clamp(origin[name] - editor.epsilon, origin[name] + editor.epsilon))
    return {name: leaf.detach() for name, leaf in leaves.items()}


@pytest.mark.parametrize("family", FAMILIES)
@every_method
def test_equals_plain_fine_tuning(method: str, family: str) -> None:
    editor, model = METHODS[method](), tiny_model(family, F64)
    expected = naive(model, editor, [[r] for r in REQUESTS[:2]])
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = weights(make(start(editor, model), REQUESTS[:2]))
    for name, value in found.items():
        torch.testing.assert_close(value, expected.get(name, before[name]), rtol=0, atol=FAMILIES[family])
    assert max(float((found[name] - before[name]).abs().max()) for name in expected) > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_equals_plain_fine_tuning_in_single_precision(family: str) -> None:
    editor, model = METHODS["FTM"](lr=1e-3), tiny_model(family, F32)
    before = {name: p.clone() for name, p in model.named_parameters()}
    expected = naive(model, editor, [[r] for r in REQUESTS[:2]])
    found = weights(make(start(editor, model), REQUESTS[:2]))
    for name, value in expected.items():
        # Adam makes a whole step of a gradient that is all round-off: a few entries may differ by that much, and how
        # many depends on the processor. One is half a hundredth of the way that all have gone.
        assert float((found[name] - value).abs().median()) < 1e-6
        assert float((found[name] - value).norm() / (value - before[name]).norm()) < 1e-2


@every_method
def test_several_edits_in_a_step_share_the_loss(method: str) -> None:
    editor, model = METHODS[method](), tiny_model("gpt2", F64)
    expected = naive(model, editor, [REQUESTS[:3], REQUESTS[3:]])
    found = weights(make(start(editor, model), REQUESTS, batch=3))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9)


def test_stops_at_the_threshold() -> None:
    session = make(start(FTM(layers=[2, 3], steps=60, lr=2e-2, loss_threshold=3.5)), REQUESTS[:1])
    facts = session.ledger.entries[0].facts
    assert facts["target_loss"] < 3.5
    assert 1 < facts["steps"] < 60
    again = make(start(FTM(layers=[3], loss_threshold=1e6)), REQUESTS[:1])  # nothing to learn: nothing is written
    assert again.ledger.entries[0].facts["steps"] == 0
    assert all(not delta.any() for delta in again.ledger.deltas.values())


def test_one_call_makes_the_model_say_it() -> None:
    model, outcome = edit(tiny_model("gpt2"), tiny_tokenizer(), REQUESTS[:1], FTM(steps=40, lr=1e-2, layers=[2, 3]))
    assert outcome.success
    assert outcome.base["efficacy"]["accuracy"] == 0
    assert not any(p.requires_grad for p in model.parameters())


def test_half_precision_loses_no_small_steps() -> None:
    """Steps of 1e-5 are below the spacing of bfloat16 weights; their sum is not."""
    session = make(start(FTM(layers=[2], steps=20, lr=1e-5), tiny_model("llama", torch.bfloat16)), REQUESTS[:1])
    (delta,) = session.ledger.deltas.values()
    assert 1e-4 < float(delta.abs().max()) < 3e-4


# ---- what is around it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_ball_stays_around_the_original_weights(family: str, dtype: torch.dtype) -> None:
    session = make(start(METHODS["FTL"](epsilon=2e-3), tiny_model(family, dtype)), REQUESTS)
    session.undo([2, 5])
    base = dict(tiny_model(family, dtype).named_parameters())
    for name in session.ledger.names.values():
        moved = (weights(session)[name] - base[name]).abs().max()
        assert 1.9e-3 < float(moved) < 2e-3 + 1e-7


@every_method
def test_a_proposal_changes_nothing(method: str) -> None:
    session = make(start(METHODS[method]()), REQUESTS[:1])
    before, state = weights(session), copy.deepcopy(session.editor.state_dict())
    random_state = torch.get_rng_state()
    one, other = (session.editor.propose(REQUESTS[1:3], REQUESTS[1:3]) for _ in range(2))
    assert equal(weights(session), before)
    assert equal(session.editor.state_dict()["sums"], state["sums"])
    assert torch.equal(torch.get_rng_state(), random_state)
    for first, second in zip(one.updates, other.updates, strict=True):
        assert torch.equal(first.delta, second.delta)
    parameters = session.ledger.adapter.model.parameters()
    assert all(not p.requires_grad and p.grad is None for p in parameters)


def test_gradients_of_the_users_model_are_left_alone() -> None:
    model = tiny_model("llama", F64).requires_grad_(True)
    make(start(METHODS["FTM"](), model), REQUESTS[:1])
    assert all(p.grad is None for p in model.parameters())


@every_method
def test_a_journal_is_done_again_bit_for_bit(method: str, tmp_path: Path) -> None:
    session = make(start(METHODS[method](), journal=tmp_path / "j"), REQUESTS[:4])
    session.undo([2])
    session.undo([4])
    session.redo([2])
    make(session, REQUESTS[4:], batch=2)
    again = start(METHODS[method](), journal=tmp_path / "j")
    again.repeat_all()
    assert equal(weights(again), weights(session))
    assert equal(again.editor.state_dict()["sums"], session.editor.state_dict()["sums"])


@every_method
def test_undo_subtracts_and_redo_adds(method: str) -> None:
    session = make(start(METHODS[method]()), REQUESTS[:2])
    second = weights(session)
    make(session, REQUESTS[2:4])
    fourth = weights(session)
    session.undo([3, 4])
    off = max(float((weights(session)[n] - w).abs().max()) for n, w in second.items())
    assert off < 1e-12
    session.redo([3, 4])
    off = max(float((weights(session)[n] - w).abs().max()) for n, w in fourth.items())
    assert off < 1e-12
    session.undo([1, 2, 3, 4])
    assert equal(weights(session), dict(tiny_model("llama", F64).named_parameters()))


def test_edits_of_one_step_go_together() -> None:
    session = make(start(METHODS["FTM"]()), REQUESTS[:3], batch=3)
    before = weights(session)
    with pytest.raises(ArgumentError, match="in one step with edit 1, 3"):
        session.undo([2])
    assert equal(weights(session), before)
    session.undo([1, 2, 3])
    with pytest.raises(ArgumentError, match="cannot be put back alone"):
        session.redo([1])
    session.redo([1, 2, 3])
    assert equal(weights(session), before)


def test_exact_undo_is_refused() -> None:
    session = make(start(METHODS["FT"]()), REQUESTS[:2])
    with pytest.raises(ArgumentError, match="trained on the weights that the earlier ones left"):
        session.undo([1], exact=True)


def test_an_edit_replaces_an_earlier_one_of_the_same_fact() -> None:
    session = make(start(METHODS["FTM"]()), REQUESTS[:1])
    make(session, [replace(REQUESTS[0], id="again", target_new="Paris")])
    assert [entry.number for entry in session.ledger.entries] == [2]
    alone = make(start(METHODS["FTM"]()), [replace(REQUESTS[0], id="again", target_new="Paris")])
    for name, value in weights(alone).items():
        torch.testing.assert_close(weights(session)[name], value, rtol=0, atol=1e-12)
    batch = make(start(METHODS["FTM"]()), REQUESTS[:2], batch=2)
    with pytest.raises(EditRefusedError, match="on_conflict"):
        make(batch, [replace(REQUESTS[0], id="again", target_new="Paris")])


@every_method
def test_a_resumed_stream_equals_an_uninterrupted_one(method: str) -> None:
    whole = make(start(METHODS[method]()), REQUESTS[:4])
    first = make(start(METHODS[method]()), REQUESTS[:2])
    file = io.BytesIO()
    torch.save({"editor": first.editor.state_dict(), "ledger": first.ledger.state_dict()}, file)
    file.seek(0)
    state = torch.load(file)
    second = start(METHODS[method]())
    second.editor.check_state(state["editor"], second.ledger.layers)
    second.editor.load_state_dict(state["editor"])
    second.ledger.load_state_dict(state["ledger"])
    make(second, REQUESTS[2:4])
    assert equal(weights(second), weights(whole))


def test_a_state_of_another_editor_or_other_layers_is_refused() -> None:
    state = make(start(METHODS["FTM"]()), REQUESTS[:1]).editor.state_dict()
    with pytest.raises(ArgumentError, match="made by FTM, this editor is FTL"):
        METHODS["FTL"]().check_state(state, [1, 2])
    with pytest.raises(ArgumentError, match="edits layers"):
        METHODS["FTM"]().check_state(state, [1])


@pytest.mark.parametrize("batch", [1, 2])
def test_divergence_is_refused_and_names_the_edit(batch: int) -> None:
    session = start(METHODS["FTM"](lr=3e37), tiny_model("llama", F32))
    before = weights(session)
    with pytest.raises(FloatingPointError, match=r"edit '0'.*diverged at step \d.*lr, now 3e\+37"):
        session.propose(REQUESTS[:batch], REQUESTS[:batch])
    assert equal(weights(session), before)
    assert not session.ledger.entries


class _Halved(UpdateTransform):
    def __call__(self, delta: Tensor, base: Tensor) -> Tensor:
        assert delta.shape == base.shape
        assert delta.dtype == base.dtype
        return delta / 2


def test_transforms_make_what_is_written_and_not_the_state() -> None:
    plain = make(start(METHODS["FTM"](), tiny_model("gpt2", F64)), REQUESTS[:1])
    half = make(start(METHODS["FTM"](transforms=[_Halved()]), tiny_model("gpt2", F64)), REQUESTS[:1])
    for layer, name in plain.ledger.names.items():
        torch.testing.assert_close(half.ledger.deltas[name] * 2, plain.ledger.deltas[name], rtol=0, atol=1e-14)
        assert torch.equal(half.editor.sums[layer], plain.editor.sums[layer])
    make(half, REQUESTS[1:3])
    half.undo([1])
    for layer, name in half.ledger.names.items():
        assert torch.equal(half.ledger.deltas[name], half.editor.sums[layer] / 2)


def test_increments_can_be_left_off_the_record() -> None:
    session = make(start(METHODS["FTM"](keep_increments=False)), REQUESTS[:2])
    with pytest.raises(ValueError, match="cannot be taken out by itself"):
        session.undo([1])


def test_status_lines_tell_step_and_loss() -> None:
    lines: list[str] = []
    session = start(METHODS["FTM"]())
    session.status = lines.append
    make(session, REQUESTS[:1])
    assert len(lines) == 5
    assert lines[0].startswith("fine-tuning on 'Italy': step 0/4, loss ")


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (FT, {"loss": "other"}),
        (FT, {"steps": 0}),
        (FTM, {"lr": 0.0}),
        (FTM, {"layers": [2, 1]}),
        (FTM, {"loss_threshold": -1.0}),
        (FTL, {"epsilon": 0.0}),
        (SAUL, {"joined": -1}),
        (SAUL, {"facts": []}),
        (SAUL, {"facts": ["One."], "joined": 2}),
    ],
)
def test_wrong_arguments_are_named(kind: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)) if "joined" not in wrong else "joined"):
        kind(**wrong)


def test_a_layer_that_does_not_exist() -> None:
    with pytest.raises(ArgumentError, match="layer 9 does not exist"):
        start(FTM(layers=[9]))
    assert FTM().resolve_layers(ModelAdapter(tiny_model())) == (2,)


# ---- SAUL's sentences ------------------------------------------------------------------------------------------------


def test_shipped_sentences_share_no_subject_with_the_shipped_facts() -> None:
    sentences = builtin_text("true_sentences.txt").splitlines()
    assert len(set(sentences)) == len(sentences) >= 40
    requests, _ = load_requests()
    for subject in {request.subject.casefold() for request in requests}:
        assert not [s for s in sentences if subject in s.casefold()], subject


def test_sentences_are_drawn_by_seed_and_edit() -> None:
    editor = SAUL()
    editor.tokenizer = tiny_tokenizer()
    state = random.getstate()
    rows = {seed: SAUL(seed=seed) for seed in (0, 1)}
    for one in rows.values():
        one.tokenizer = tiny_tokenizer()
    assert editor.lessons(REQUESTS[0]) == rows[0].lessons(REQUESTS[0])
    assert any(editor.lessons(r) != rows[1].lessons(r) for r in REQUESTS)
    assert random.getstate() == state
    (lesson,) = editor.lessons(REQUESTS[0])
    text = tiny_tokenizer().decode([lesson.ids[0], *lesson.words])
    assert text.startswith("The capital of Italy is Vienna. ")
    assert text.removeprefix("The capital of Italy is Vienna. ") in editor.random_facts


def test_sentences_of_the_users_own(tmp_path: Path) -> None:
    file = tmp_path / "facts.txt"
    file.write_text("Italy is warm.\n\nOaks are trees.\n", encoding="utf-8")
    editor = SAUL(facts=str(file), joined=2)
    assert editor.random_facts == ("Italy is warm.", "Oaks are trees.")
    editor.tokenizer = tiny_tokenizer()
    (lesson,) = editor.lessons(REQUESTS[0])
    assert tiny_tokenizer().decode([lesson.ids[0], *lesson.words]) == "The capital of Italy is Vienna. Oaks are trees."
    with pytest.raises(DataError, match="no such file"):
        SAUL(facts=str(tmp_path / "none.txt"))


def test_without_increments_an_edit_cannot_be_replaced() -> None:
    session = make(start(FTM(layers=[1], steps=2, keep_increments=False)), REQUESTS[:1])
    again = replace(REQUESTS[0], id="again", target_new="Paris")
    with pytest.raises(EditRefusedError, match=r"set model.on_conflict to average"):
        session.propose([again], [again])
    assert len(session.ledger) == 1
