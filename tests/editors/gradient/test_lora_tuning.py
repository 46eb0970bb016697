"""LoRA and AdaLoRA: the product is peft's, the model is left alone, ranks are allocated, streams go on."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lit_edit.editors.gradient.lora_tuning import AdaLoRA, LoRA, factors, low_rank_update
from lit_edit.errors import ArgumentError
from lit_edit.export.lora import factorise
from lit_edit.models.adapter import ModelAdapter
from lit_edit.testing import tiny_model, tiny_requests, tiny_tokenizer
from lit_edit.text.tokens import continuation
from tests.editors.gradient.test_gradient import equal, make, start, weights

REQUESTS = tiny_requests()
F64 = torch.float64
METHODS: dict[str, Callable[..., LoRA]] = {
    "LoRA": lambda **o: LoRA(**{"layers": [1, 2], "steps": 6, "lr": 1e-2, "rank": 2, **o}),
    "AdaLoRA": lambda **o: AdaLoRA(**{"layers": [1, 2], "steps": 10, "lr": 2e-2, "rank": 2, "init_rank": 4, **o}),
}
every_method = pytest.mark.parametrize("method", METHODS)


def ranks_of(editor: LoRA) -> list[int]:
    return [int((editor.held[f"E.{layer}"] != 0).sum()) for layer in (1, 2)]


@pytest.mark.parametrize(("family", "tolerance"), [("gpt2", 1e-9), ("llama", 1e-6)])
def test_lora_equals_a_plain_adapter(family: str, tolerance: float) -> None:
    """A hook that adds the product to the layer's output, and Adam on its two factors through two edits."""
    model = tiny_model(family, F64)
    session = make(start(METHODS["LoRA"](loss_threshold=0), model), REQUESTS[:2])
    found = weights(session)

    plain = tiny_model(family, F64)
    adapter, parts = ModelAdapter(plain), {}
    _, layers = METHODS["LoRA"]().__class__._tuner(session.editor)
    for layer in (1, 2):
        first = factors(layers[layer])
        down, up = (first[name].detach().clone().requires_grad_() for name in "AB")
        parts[layer] = (down, up)

        def add(module: nn.Module, args: tuple[Any, ...], output: Any, down: Any = down, up: Any = up) -> Any:
            return output + 16.0 * args[0] @ down.T @ up.T

        adapter.down_proj(layer).register_forward_hook(add)
    leaves = [leaf for pair in parts.values() for leaf in pair]
    for request in REQUESTS[:2]:
        adam = torch.optim.Adam(leaves, lr=1e-2)
        prompt, target = continuation(tiny_tokenizer(), request.text, request.target_new)
        for _ in range(6):
            logits = plain(input_ids=torch.tensor([[*prompt, *target[:-1]]])).logits[0, len(prompt) - 1 :]
            adam.zero_grad()
            nn.functional.cross_entropy(logits, torch.tensor(target)).backward()
            adam.step()
    for layer, (down, up) in parts.items():
        expected = plain.get_submodule(adapter.weight_name(layer).removesuffix(".weight"))
        delta = 16.0 * up @ down
        delta = delta.T if isinstance(expected, Conv1D) else delta
        torch.testing.assert_close(found[adapter.weight_name(layer)], expected.weight + delta, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@every_method
def test_the_update_is_the_product(method: str, family: str) -> None:
    session = make(start(METHODS[method](), tiny_model(family)), REQUESTS[:3])
    held, scale = session.editor.held, session.editor.scale
    for layer, name in session.ledger.names.items():
        product = low_rank_update(held, layer, scale)
        torch.testing.assert_close(session.ledger.deltas[name], product, rtol=0, atol=1e-6)
    parts = factorise(session.ledger.deltas)
    assert all(part.needed <= (2 if method == "LoRA" else 4) for part in parts.values())
    assert all(float(delta.norm()) > 1e-3 for delta in session.ledger.deltas.values())


@every_method
@pytest.mark.parametrize("fails", [False, True])
def test_the_users_model_is_left_alone(method: str, fails: bool) -> None:
    model = tiny_model("llama")
    own = {"_lit_edit"}  # which ledger the model is of
    modules = {name: (type(module), set(vars(module)), id(module)) for name, module in model.named_modules()}
    parameters = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    config, training = copy.deepcopy(model.config.to_dict()), model.training
    editor = METHODS[method](lr=3e37 if fails else 1e-2)
    session = start(editor, model)
    state = torch.get_rng_state()
    if fails:
        before = weights(session)
        with pytest.raises(FloatingPointError, match="edit '0'"):
            session.propose(REQUESTS[:1], REQUESTS[:1])
        assert equal(weights(session), before)
        assert not editor.held
    else:
        make(session, REQUESTS[:2])
    assert {n: (type(m), set(vars(m)) - own, id(m)) for n, m in model.named_modules()} == modules
    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters()} == parameters
    assert (model.config.to_dict(), model.training) == (config, training)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_ranks_are_allocated() -> None:
    editor = METHODS["AdaLoRA"](loss_threshold=0)
    seen: list[list[int]] = []
    session = start(editor)
    learner = editor.learner(editor._written({}))
    told = learner.stepped

    def count(step: int) -> None:
        told(step)
        seen.append([int((factors(layer)["E"] != 0).sum()) for layer in learner.layers.values()])

    learner.stepped = count
    editor._fit(REQUESTS[:1], learner, lambda line: None)
    totals = [sum(ranks) for ranks in seen]
    assert totals[0] == 8  # two layers of four directions
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] == 4  # rank 2 on average
    make(session, REQUESTS[:2])
    assert sum(ranks_of(editor)) == 4


def test_directions_are_kept_orthogonal() -> None:
    def off(weight: float) -> float:
        editor = METHODS["AdaLoRA"](orthogonal=weight, loss_threshold=0, steps=30)
        make(start(editor), REQUESTS[:1])
        down = editor.held["A.1"]
        return float((down @ down.T - torch.eye(4, dtype=F64)).norm())

    assert off(10.0) < 0.7 * off(0.0)


@every_method
def test_a_proposal_changes_nothing(method: str) -> None:
    session = make(start(METHODS[method]()), REQUESTS[:1])
    before, held = weights(session), {n: f.clone() for n, f in session.editor.held.items()}
    one, other = (session.editor.propose(REQUESTS[1:3], REQUESTS[1:3]) for _ in range(2))
    assert equal(weights(session), before)
    assert equal(session.editor.held, held)
    for first, second in zip(one.updates, other.updates, strict=True):
        assert torch.equal(first.delta, second.delta)


@every_method
def test_a_journal_is_done_again_bit_for_bit(method: str, tmp_path: Path) -> None:
    session = make(start(METHODS[method](), journal=tmp_path / "j"), REQUESTS[:3])
    session.undo([2])
    session.redo([2])
    session.undo([1])
    make(session, REQUESTS[3:], batch=3)
    again = start(METHODS[method](), journal=tmp_path / "j")
    again.repeat_all()
    assert equal(weights(again), weights(session))
    assert equal(again.editor.held, session.editor.held)


@every_method
def test_undo_and_redo(method: str) -> None:
    session = make(start(METHODS[method]()), REQUESTS[:1])
    first = weights(session)
    make(session, REQUESTS[1:2])
    second = weights(session)
    session.undo([2])
    assert max(float((weights(session)[n] - w).abs().max()) for n, w in first.items()) < 1e-12
    session.redo([2])
    assert max(float((weights(session)[n] - w).abs().max()) for n, w in second.items()) < 1e-12
    session.undo([1, 2])
    assert equal(weights(session), dict(tiny_model("llama", F64).named_parameters()))
    assert not session.editor.held
    make(session, [REQUESTS[2]])
    assert equal(weights(session), weights(make(start(METHODS[method]()), [REQUESTS[2]])))


def test_an_edit_after_an_undo_begins_with_the_weights_that_hold() -> None:
    session = make(start(METHODS["LoRA"]()), REQUESTS[:2])
    session.undo([1])
    for name, weight in session.editor._weights(
        session.editor.learner(session.editor._written(session.editor.sums)).updates()
    ).items():
        torch.testing.assert_close(weight.detach(), weights(session)[name], rtol=0, atol=1e-12)


@every_method
def test_a_resumed_stream_equals_an_uninterrupted_one(method: str) -> None:
    whole = make(start(METHODS[method]()), REQUESTS[:4])
    first = make(start(METHODS[method]()), REQUESTS[:2])
    file = io.BytesIO()
    torch.save({"editor": first.editor.state_dict(), "ledger": first.ledger.state_dict()}, file)
    file.seek(0)
    state = torch.load(file)
    second = start(METHODS[method]())
    second.editor.load_state_dict(state["editor"])
    second.ledger.load_state_dict(state["ledger"])
    make(second, REQUESTS[2:4])
    assert equal(weights(second), weights(whole))


def test_the_seed_decides() -> None:
    one, same, other = (weights(make(start(METHODS["LoRA"](seed=s)), REQUESTS[:1])) for s in (0, 0, 1))
    assert equal(one, same)
    assert not equal(one, other)


def test_without_peft_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ArgumentError, match=r'pip install "lit-edit\[adapters\]"'):
        LoRA()


@pytest.mark.parametrize(
    ("kind", "wrong", "named"),
    [
        (LoRA, {"rank": 0}, "rank"),
        (LoRA, {"alpha": 0.0}, "alpha"),
        (AdaLoRA, {"rank": 8, "init_rank": 4}, "init_rank"),
        (AdaLoRA, {"warm_up": 0.6, "settled": 0.5}, "warm_up"),
        (AdaLoRA, {"orthogonal": -1.0}, "orthogonal"),
    ],
)
def test_wrong_arguments_are_named(kind: Any, wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        kind(**wrong)
