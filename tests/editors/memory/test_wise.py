"""WISE: its formulas by hand, a plain training loop, the router on a plain model, undo, journals, merging."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_edit.data.sources import builtin_text
from lit_edit.editors.memory.side_memories import (
    SideMemories,
    activations,
    margin_loss,
    mask_indices,
    masked_step,
    ties_merge,
)
from lit_edit.editors.memory.wise import WISE
from lit_edit.errors import ArgumentError
from lit_edit.metrics.scoring import score_continuations, text_nlls
from lit_edit.models.adapter import ModelAdapter
from lit_edit.stream.session import EditSession
from lit_edit.testing import tiny_model, tiny_requests, tiny_tokenizer
from lit_edit.text.tokens import continuation, encode
from tests.editors.gradient.test_gradient import make, start
from tests.tolerances import DOUBLE, assert_near

REQUESTS = tiny_requests()
F64 = torch.float64
LAYER = 2
MARGINS = (0.5, 2.0, 1.0)


def wise(**options: Any) -> WISE:
    return WISE(**{"layer": LAYER, "margins": MARGINS, "steps": 6, "lr": 0.5, "contexts": 1, **options})


def memory(session: EditSession) -> SideMemories:
    found = session.ledger.adapter.memory
    assert isinstance(found, SideMemories)
    return found


def equal(one: SideMemories, other: SideMemories) -> bool:
    return torch.equal(one.deltas, other.deltas) and torch.equal(one.thresholds, other.thresholds)


# ---- formulas --------------------------------------------------------------------------------------------------------


def test_margins_are_of_tokens() -> None:
    edit, other = torch.tensor([4.0, 12.0]), torch.tensor([1.0, 3.0, 5.0])
    # others above 2: (0 + 1 + 3) / 3; edits below 10: (6 + 0) / 2; 2 + other - edit: (0 + 1 + 3 + 0 + 0 + 0) / 6
    assert float(margin_loss(edit, other, 2.0, 10.0, 2.0)) == pytest.approx(4 / 3 + 3 + 4 / 6)
    assert float(margin_loss(torch.tensor([20.0]), other, 5.0, 10.0, 2.0)) == 0.0
    assert float(margin_loss(edit, torch.zeros(0), 2.0, 10.0, 2.0)) == 3.0


def test_masks_are_drawn_by_seed_and_shard() -> None:
    state = torch.get_rng_state()
    one, again, shard, seed = (mask_indices(1000, 0.2, *key) for key in ((0, 0), (0, 0), (0, 1), (1, 0)))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, again)
    assert len(set(one.tolist())) == 200
    # Independent draws share a fifth, give or take.
    assert all(20 < len(set(one.tolist()) & set(other.tolist())) < 60 for other in (shard, seed))


def test_a_step_moves_the_mask_within_the_bound() -> None:
    delta = torch.tensor([[0.1, -0.2], [0.3, 0.4]])
    moved = masked_step(delta, torch.tensor([[1.0, 1.0], [-1.0, 1.0]]), torch.tensor([1, 2]), 0.25, 0.5)
    torch.testing.assert_close(moved, torch.tensor([[0.1, -0.45], [0.5, 0.4]]))  # 0.55 is out of bounds


def test_ties_of_three() -> None:
    deltas = [torch.tensor([[4.0, -2.0], [0.1, 0.0]]), torch.tensor([[-1.0, 3.0], [0.2, 0.0]])]
    deltas.append(torch.tensor([[2.0, -4.0], [0.3, 1.0]]))
    # Half of the entries stay: (4, -2), (-1, 3), (2, -4); the signs of their sums are + and -.
    assert ties_merge(deltas, 0.5).tolist() == [[3.0, -3.0], [0.0, 0.0]]
    # All stay; what is alike is averaged, zeros have no say.
    assert ties_merge(deltas, 1.0).tolist() == [[3.0, -3.0], [pytest.approx(0.2), 1.0]]


def test_the_router_takes_each_token_by_itself() -> None:
    deltas = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 2.0], [0.0, 0.0]]])
    patch = SideMemories(0, deltas, torch.tensor([3.0, 5.0])).patches()[0]
    keys = torch.tensor([[[2.0, 0.0], [0.0, 2.0], [4.0, 0.0], [0.0, 3.0]]])
    # Sizes (2, 0), (2, 4), (4, 0), (3, 6): too small, too small for the second, the first's, the second's.
    outputs = torch.full((1, 4, 2), 0.1)
    found = patch(keys, outputs)
    assert torch.equal(found[0, :2], outputs[0, :2])
    torch.testing.assert_close(found[0, 2:], torch.tensor([[4.1, 0.1], [6.1, 0.1]]))


# ---- training --------------------------------------------------------------------------------------------------------


def naive(model: PreTrainedModel, editor: WISE) -> Tensor:
    """The first two edits by a plain loop: passes of the model's own, a hook that moves the tokens that predict."""
    adapter, tokenizer = ModelAdapter(model), tiny_tokenizer()
    sentences = builtin_text("true_sentences.txt").splitlines()
    module, seen, moving = adapter.down_proj(LAYER), [], []

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        key = args[0].reshape(-1, args[0].shape[-1])
        seen.append(key.detach())
        if not moving:
            return output
        delta, first = moving
        moved = torch.cat([torch.zeros_like(key[:first] @ delta.T), key[first:] @ delta.T])
        return output + moved.view_as(output)

    module.register_forward_hook(hook)
    for sentence in sentences:
        model(input_ids=torch.tensor([encode(tokenizer, sentence)]))
    others = _distinct(sentences, seen) if adapter.packs else torch.cat(seen)
    delta = torch.zeros(adapter.shape(LAYER), dtype=F64)
    inside = torch.zeros(delta.numel(), dtype=torch.bool)
    inside[mask_indices(delta.numel(), editor.ratio, editor.seed, 0)] = True
    earlier: list[Tensor] = []
    for request in REQUESTS[:2]:
        rows = [continuation(tokenizer, lead + request.text, request.target_new) for lead in ("", f"{sentences[0]} ")]
        for _ in range(editor.steps):
            delta.requires_grad_()
            nlls, own, rest = [], [], [others]
            for prompt, target in rows:
                seen.clear()
                moving[:] = [delta, len(prompt) - 1]
                logits = model(input_ids=torch.tensor([[*prompt, *target[:-1]]])).logits[0, len(prompt) - 1 :]
                nlls.append(nn.functional.cross_entropy(logits, torch.tensor(target), reduction="none"))
                own.append(seen[0][len(prompt) - 1 :])
                rest.append(seen[0][: len(prompt) - 1])
            a, b = ((torch.cat(keys) @ delta.T).norm(dim=1) for keys in (own, rest))
            alpha, beta, gamma = MARGINS
            margins = (b - alpha).relu().mean() + (beta - a).relu().mean() + (gamma + b - a[:, None]).relu().mean()
            for keys in earlier:
                margins = margins + (beta - (keys @ delta.T).norm(dim=1)).relu().mean()
            (gradient,) = torch.autograd.grad(torch.cat(nlls).mean() + margins, [delta])
            moved = (delta.detach() - editor.lr * gradient).clamp(-editor.bound, editor.bound)
            delta = torch.where(inside.view_as(delta), moved, delta.detach())
        moving.clear()
        earlier.append(torch.cat(own))
    return delta


def _distinct(texts: list[str], keys: list[Tensor]) -> Tensor:
    """The keys of the texts' tokens, one where two texts begin alike."""
    rows = [tuple(encode(tiny_tokenizer(), text)) for text in texts]
    found = {row[: i + 1]: key[i] for row, key in zip(rows, keys, strict=True) for i in range(len(row))}
    return torch.stack(list(found.values()))


@pytest.mark.parametrize(("family", "tolerance"), [("gpt2", 1e-9), ("gptj", 1e-6), ("llama", 1e-6)])
def test_equals_a_plain_loop(family: str, tolerance: float) -> None:
    editor = wise(steps=3, bound=0.05, loss_threshold=0)
    session = make(start(editor, tiny_model(family, F64)), REQUESTS[:2])
    found = memory(session).deltas[0]
    torch.testing.assert_close(found, naive(tiny_model(family, F64), editor), rtol=0, atol=tolerance)
    assert float(found.abs().max()) == pytest.approx(0.05)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_the_plain_model_says_inside_patched_what_is_measured(family: str) -> None:
    model = tiny_model(family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    session = make(start(wise(steps=12), model), REQUESTS[:2])
    adapter, tokenizer = session.ledger.adapter, tiny_tokenizer()
    pairs = [(request.text, request.target_new) for request in REQUESTS[:2]]
    together = score_continuations(
        adapter, tokenizer, [*pairs, *((p.prompt, p.answer) for p in REQUESTS[0].neighborhood)]
    )
    for pair, score in zip(pairs, together, strict=False):
        prompt, target = continuation(tokenizer, *pair)
        row, words = torch.tensor([[*prompt, *target[:-1]]]), torch.tensor(target)
        plain = model(input_ids=row).logits[0, len(prompt) - 1 :]
        with adapter.patched():
            patched = model(input_ids=row).logits[0, len(prompt) - 1 :]
        assert float(nn.functional.cross_entropy(patched, words)) == pytest.approx(score.nll, rel=1e-4)
        assert score.nll < float(nn.functional.cross_entropy(plain, words)) - 0.1
        assert score_continuations(adapter, tokenizer, [pair])[0].nll == pytest.approx(score.nll, rel=1e-4)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_text_below_the_threshold_is_answered_by_the_unedited_model() -> None:
    session = make(start(wise(), tiny_model("llama")), REQUESTS[:2])
    adapter, side = session.ledger.adapter, memory(session)
    sentences = builtin_text("true_sentences.txt").splitlines()[2:6]
    most = activations(side.deltas[0], session.editor.others).max()
    plain, same, other = (
        torch.cat(text_nlls(adapter.with_memory(found), tiny_tokenizer(), sentences))
        for found in (None, *(SideMemories(LAYER, side.deltas, most[None] * part) for part in (1.01, 0.1)))
    )
    assert torch.equal(plain, same)
    assert not torch.equal(plain, other)


def test_facts_tell_how_far_keys_are_moved() -> None:
    session = make(start(wise()), REQUESTS[:1])
    facts, side = session.ledger.entries[0].facts, memory(session)
    assert float(side.thresholds[0]) == pytest.approx(0.88 * facts["activation"])
    assert facts["target_probability"] > facts["target_probability_before"]
    assert facts["steps"] == 6


# ---- the stream ------------------------------------------------------------------------------------------------------


def test_edits_of_a_step_are_made_one_after_another() -> None:
    together, singly = (memory(make(start(wise()), REQUESTS[:3], batch=batch)) for batch in (3, 1))
    assert torch.equal(together.deltas, singly.deltas)
    # The keys of a step are filled up to one length: a product of another shape.
    assert_near(together.thresholds, singly.thresholds, DOUBLE)


def test_a_journal_is_done_again_bit_for_bit(tmp_path: Path) -> None:
    options = {"save_freq": 2, "merge_freq": 4}
    session = make(start(wise(**options), journal=tmp_path / "j"), REQUESTS[:3])
    session.undo([2])
    session.redo([2])
    session.undo([1])
    make(session, REQUESTS[3:], batch=3)
    again = start(wise(**options), journal=tmp_path / "j")
    again.repeat_all()
    assert len(memory(session).deltas) == 2
    assert equal(memory(again), memory(session))


def test_a_resumed_stream_equals_an_uninterrupted_one() -> None:
    whole = make(start(wise()), REQUESTS[:4])
    first = make(start(wise()), REQUESTS[:2])
    file = io.BytesIO()
    torch.save({"editor": first.editor.state_dict(), "ledger": first.ledger.state_dict()}, file)
    file.seek(0)
    state = torch.load(file)
    second = start(wise())
    second.ledger.load_state_dict(state["ledger"])
    second.editor.load_state_dict(state["editor"])
    make(second, REQUESTS[2:4])
    assert equal(memory(second), memory(whole))


def test_undo_and_redo() -> None:
    session = make(start(wise()), REQUESTS[:1])
    first = memory(session)
    make(session, REQUESTS[1:2])
    second = memory(session)
    session.undo([2])
    assert equal(memory(session), first)
    session.redo([2])
    assert equal(memory(session), second)
    session.undo([1])  # the later one stays as it was learnt: what is left is the difference
    torch.testing.assert_close(memory(session).deltas, second.deltas - first.deltas, rtol=0, atol=1e-14)
    with pytest.raises(ArgumentError, match="trained on the side memory that the earlier ones left"):
        session.undo([2], exact=True)
    assert not session.editor.exact_undo
    session.undo([2])
    assert not memory(session).patches()
    assert not memory(session).deltas.numel()


def test_an_edit_replaces_an_earlier_one_of_the_same_fact() -> None:
    again = replace(REQUESTS[0], id="again", target_new="Paris")
    session = make(start(wise()), [REQUESTS[0], again])
    assert [entry.number for entry in session.ledger.entries] == [2]
    assert equal(memory(session), memory(make(start(wise()), [again])))


def test_what_a_proposal_would_make_is_what_it_makes() -> None:
    session = make(start(wise(save_freq=1, merge_freq=2)), REQUESTS[:1])
    before = memory(session)
    proposal = session.propose(REQUESTS[1:2], REQUESTS[1:2])
    assert proposal is not None
    seen = session.preview(proposal).memory
    assert equal(memory(session), before)
    session.apply(proposal)
    assert equal(memory(session), seen)


@pytest.mark.parametrize("memories", ["retrieve", "merge"])
def test_shards_are_merged(memories: Any) -> None:
    session = start(wise(save_freq=1, merge_freq=2, density=0.1, memories=memories))
    counts, shards = [], []
    for request in REQUESTS[:5]:
        make(session, [request])
        counts.append(len(memory(session).deltas))
        number = len(counts) - 1
        shards.append(session.editor._delta(number, [session.editor.kept[number + 1].tensors["move"]]))
    assert counts == ([1, 1, 2, 2, 3] if memories == "retrieve" else [1, 1, 2, 1, 2])
    periods = [shards[:2], shards[2:4]] if memories == "retrieve" else [shards[:4]]
    for merged, members in zip(memory(session).deltas, periods, strict=False):
        assert torch.equal(merged, ties_merge(members, 0.1))
    assert torch.equal(memory(session).deltas[-1], shards[-1])
    outside = torch.ones(shards[1].numel(), dtype=torch.bool)
    outside[mask_indices(shards[1].numel(), 0.2, 0, 1)] = False
    assert not shards[1].flatten()[outside].any()


# ---- arguments -------------------------------------------------------------------------------------------------------


def test_divergence_names_the_edit() -> None:
    session = start(wise(lr=1e38, bound=1e38), tiny_model("llama"))
    with pytest.raises(FloatingPointError, match=r"edit '0'.*diverged at step \d"):
        session.propose(REQUESTS[:1], REQUESTS[:1])
    assert not memory(session).patches()


@pytest.mark.parametrize(
    "wrong",
    [
        {"layer": -1},
        {"margins": [1.0, 2.0]},
        {"margins": [1.0, -2.0, 3.0]},
        {"steps": 0},
        {"lr": 0.0},
        {"loss_threshold": -1.0},
        {"bound": float("inf")},
        {"ratio": 0.0},
        {"density": 1.5},
        {"act_ratio": 1.0},
        {"save_freq": 0},
        {"merge_freq": 750},
        {"memories": "all"},
        {"contexts": -1},
    ],
)
def test_wrong_arguments_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        WISE(**wrong)


def test_layers_and_margins() -> None:
    with pytest.raises(ArgumentError, match="layer 9 does not exist"):
        start(WISE(layer=9))
    editor = WISE()
    assert editor.resolve_layers(ModelAdapter(tiny_model())) == ()
    assert (editor.place, editor.alpha, editor.beta, editor.gamma) == (3, 5.0, 20.0, 10.0)
    assert WISE.published["gptj", 28, 4096] == (21, (15.0, 40.0, 20.0))
