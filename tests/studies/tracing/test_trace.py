"""Tracing equals brute force: whole passes with hooks, one restoration and one noise sample at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_edit.models import ModelAdapter
from lit_edit.studies.tracing import KINDS, FactTrace, KnownFact, TokenizedFact, tokenize_fact, trace_fact
from lit_edit.studies.tracing.trace import window_around
from lit_edit.testing import tiny_model, tiny_tokenizer
from tests.tolerances import rounding

FACT = KnownFact("0", "The capital of Italy is the city of", "Italy", "Rome", 15)
LAYERS = {"llama": "model.layers", "gpt2": "transformer.h", "gptj": "transformer.h", "gemma2": "model.layers"}
LAYERS |= {"gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers", "mistral": "model.layers"}


def make(model_type: str = "llama", subject: str = "Italy is") -> tuple[ModelAdapter, TokenizedFact, Tensor]:
    fact = KnownFact("0", FACT.prompt, subject, "Rome", 15)
    located = tokenize_fact(tiny_tokenizer(), fact)
    first, behind = located.subject
    noise = 0.5 * torch.randn(3, behind - first, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return ModelAdapter(tiny_model(model_type, torch.float64)), located, noise


@contextmanager
def hooks(model: nn.Module, changes: dict[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    def hook(change: Callable[[Tensor], Tensor]) -> Any:
        def run(module: nn.Module, args: Any, output: Any) -> Any:
            return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

        return run

    handles = [model.get_submodule(name).register_forward_hook(hook(change)) for name, change in changes.items()]
    yield
    for handle in handles:
        handle.remove()


def brute_force(adapter: ModelAdapter, fact: TokenizedFact, noise: Tensor, kind: str, window: int) -> dict[str, Any]:
    """Restore one place in one noisy pass at a time, with the model's own forward."""
    model, ids = adapter.model, torch.tensor([fact.ids])
    first, behind = fact.subject
    stack = LAYERS[model.config.model_type]
    names = dict(model.named_modules())
    embedding = next(n for n, m in names.items() if m is model.get_input_embeddings())
    attentions = (".0.self_attn", ".0.attn", ".0.attention")
    inner = {
        "hidden": "",
        "mlp": f".{adapter.spec.down_proj}",
        "attn": next(n.removeprefix(f"{stack}.0") for n in names if n.endswith(attentions)),
    }[kind]  # fmt: skip
    clean: dict[str, Tensor] = {}

    def store(name: str) -> Callable[[Tensor], Tensor]:
        return lambda output: clean.setdefault(name, output.clone())

    modules = [f"{stack}.{layer}{inner}" for layer in range(4)]
    with hooks(model, {name: store(name) for name in modules}):
        plain = torch.softmax(model(input_ids=ids).logits[0, -1], -1)
    answer = int(plain.argmax())

    def noisy(sample: Tensor, restored: list[str], token: int) -> float:
        def add(output: Tensor) -> Tensor:
            output = output.clone()
            output[0, first:behind] += sample
            return output

        def restore(name: str) -> Callable[[Tensor], Tensor]:
            def change(output: Tensor) -> Tensor:
                output = output.clone()
                output.view(-1, output.shape[-1])[token] = clean[name].view(-1, output.shape[-1])[token]
                return output

            return change

        with hooks(model, {embedding: add, **{name: restore(name) for name in restored}}):
            return float(torch.softmax(model(input_ids=ids).logits[0, -1], -1)[answer])

    def mean(restored: list[str], token: int) -> float:
        return sum(noisy(sample, restored, token) for sample in noise) / len(noise)

    spans = [(layer, layer + 1) if kind == "hidden" else window_around(layer, window, 4) for layer in range(4)]
    return {
        "answer": answer,
        "p_clean": float(plain[answer]),
        "p_corrupt": mean([], 0),
        "restored": [[mean(modules[a:b], token) for token in range(len(fact.ids))] for a, b in spans],
    }


def near(model_type: str, found: FactTrace) -> float:
    """What passes of another shape make of a probability."""
    return rounding(model_type) * found.p_clean


def check(found: FactTrace, expected: dict[str, Any], kind: str, model_type: str) -> None:
    start, most = found.subject[0], near(model_type, found)
    assert found.answer == str(expected["answer"])
    assert found.p_clean == pytest.approx(expected["p_clean"], abs=most)
    assert found.p_corrupt == pytest.approx(expected["p_corrupt"], abs=most)
    assert abs(found.p_clean - found.p_corrupt) > 1e-6  # noise does something
    for ours, theirs in zip(found.restored[kind], expected["restored"], strict=True):
        assert ours == pytest.approx(theirs[start:], abs=most)
        assert theirs[:start] == pytest.approx([expected["p_corrupt"]] * start, abs=most)  # nothing is corrupted there
    assert len({round(p, 9) for row in found.restored[kind] for p in row}) > 8  # places differ


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["llama", "gptj"])
def test_tracing_equals_brute_force(model_type: str, kind: Any) -> None:
    adapter, fact, noise = make(model_type)
    check(trace_fact(adapter, fact, noise, window=3), brute_force(adapter, fact, noise, kind, 3), kind, model_type)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "opt", "gemma2", "mistral"])
def test_every_kind_of_layer(model_type: str) -> None:
    adapter, fact, noise = make(model_type)
    found = trace_fact(adapter, fact, noise[:1], window=2)
    for kind in KINDS:
        check(found, brute_force(adapter, fact, noise[:1], kind, 2), kind, model_type)


def test_long_prompts_are_traced_in_portions() -> None:
    adapter, fact, noise = make()
    whole = trace_fact(adapter, fact, noise)
    portions = trace_fact(adapter, fact, noise, most_tokens=1)
    for kind in KINDS:
        for ours, theirs in zip(portions.restored[kind], whole.restored[kind], strict=True):
            assert ours == pytest.approx(theirs, abs=near("llama", whole))


@pytest.mark.parametrize("model_type", ["llama", "gptj"])
@pytest.mark.parametrize("window", [1, 2, 3, 9])
def test_restorations_run_together_as_alone(model_type: str, window: int) -> None:
    adapter, fact, noise = make(model_type)
    together = trace_fact(adapter, fact, noise, window=window)
    for most in (1, 60):  # one at a time; two or three, so that some depart from those of an earlier batch
        apart = trace_fact(adapter, fact, noise, window=window, most_together=most)
        for kind in KINDS:
            for ours, theirs in zip(apart.restored[kind], together.restored[kind], strict=True):
                assert ours == pytest.approx(theirs, abs=near(model_type, together))


def test_the_last_token_behind_the_last_layer_restores_everything() -> None:
    adapter, fact, noise = make()
    found = trace_fact(adapter, fact, noise, kinds=["hidden"])
    assert found.restored["hidden"][-1][-1] == pytest.approx(found.p_clean, rel=rounding("llama"))
    assert found.restored["hidden"][-1][:-1] == pytest.approx(
        [found.p_corrupt] * (len(found.tokens) - fact.subject[0] - 1)
    )


def test_a_window_over_all_layers_at_every_layer_is_the_same() -> None:
    adapter, fact, noise = make()
    rows = trace_fact(adapter, fact, noise, kinds=["mlp"], window=99).restored["mlp"]
    assert all(row == rows[0] for row in rows)


def test_the_model_is_left_as_it_was() -> None:
    adapter, fact, noise = make()
    before = adapter.model(input_ids=torch.tensor([fact.ids])).logits
    trace_fact(adapter, fact, noise)
    assert torch.equal(adapter.model(input_ids=torch.tensor([fact.ids])).logits, before)


def test_noise_that_does_not_fit() -> None:
    adapter, fact, noise = make()
    with pytest.raises(ValueError, match=r"noise must be \(samples, 3 subject tokens, width\), got \(3, 1, 32\)"):
        trace_fact(adapter, fact, noise[:, :1])
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        trace_fact(adapter, fact, noise, window=0)


def test_windows() -> None:
    assert [window_around(layer, 10, 30) for layer in (0, 5, 15, 29)] == [(0, 5), (0, 10), (10, 20), (24, 30)]
    assert [window_around(layer, 5, 8) for layer in (0, 4, 7)] == [(0, 3), (2, 7), (5, 8)]


def test_traces_survive_json() -> None:
    import json

    adapter, fact, noise = make()
    found = trace_fact(adapter, fact, noise)
    assert FactTrace.from_dict(json.loads(json.dumps(vars(found)))) == found
