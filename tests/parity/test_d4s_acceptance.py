"""The nine acceptance tests of D4S (arXiv 2410.23843), and what else its editors must do on a model.

Everything runs through the editors and the ledger as a stream would call them: propose, commit, accept.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_edit.data.request import EditRequest
from lit_edit.editors import D4S, MEMIT, ClosedFormEditor, Proposal, TargetSettings
from lit_edit.editors.base import commit_proposal
from lit_edit.files.trees import load_tree, save_tree
from lit_edit.ledger.edit_ledger import EditLedger
from lit_edit.models import ModelAdapter
from lit_edit.targets.problem import build_problem
from lit_edit.testing import tiny_model, tiny_requests, tiny_tokenizer

TEMPLATES = [["{}"], ["I say. {}", "Then the man of the house went. {}"]]
FEW_STEPS = TargetSettings(steps=5)
MODES = ("shared", "remeasured", "uniform")
EXACT = {"rtol": 0.0, "atol": 0.0}
# float64 throughout: round-off of targets (Adam magnifies it), of the model and of a solve of size 128.
CLOSE = {"rtol": 1e-8, "atol": 1e-8}

every_mode = pytest.mark.parametrize("mode", MODES)


def tiny(family: str = "gpt2", dtype: torch.dtype = torch.float64, **settings: object) -> PreTrainedModel:
    return tiny_model(family, dtype, initializer_range=0.3, **settings)


def read_moments(adapter: ModelAdapter, layers: Sequence[int]) -> dict[int, Tensor]:
    """E[k k^T] over six hundred random tokens, with a little ridge."""
    ids = torch.randint(3, 400, (20, 30), generator=torch.Generator().manual_seed(0))
    moments = {}
    for layer, keys in adapter.read_keys(ids, torch.ones_like(ids), layers).items():
        flat = keys.flatten(0, 1).double()
        moment = flat.T @ flat / len(flat)
        moments[layer] = moment + 1e-3 * moment.diagonal().mean() * torch.eye(len(moment))
    return moments


@cache
def gpt2_moments() -> dict[int, Tensor]:
    return read_moments(ModelAdapter(tiny()), range(4))


@dataclass
class Run:
    """One editor on one fresh model."""

    editor: ClosedFormEditor
    model: PreTrainedModel = field(default_factory=tiny)
    moments: dict[int, Tensor] | None = None

    def __post_init__(self) -> None:
        adapter = ModelAdapter(self.model)
        self.ledger = EditLedger(adapter, self.editor.resolve_layers(adapter))
        moments = gpt2_moments() if self.moments is None else self.moments
        self.editor.prepare(self.ledger, tiny_tokenizer(), moments)

    def edit(self, *requests: EditRequest, window: Sequence[EditRequest] = ()) -> Proposal:
        proposal = self.editor.propose(requests, window)
        commit_proposal(self.ledger, self.editor, proposal)
        return proposal

    def stream(self, requests: Sequence[EditRequest]) -> Run:
        for request in requests:
            self.edit(request, window=requests)
        return self

    def delta(self, layer: int) -> Tensor:
        return self.ledger.deltas[self.ledger.names[layer]]

    def weight(self, layer: int) -> Tensor:
        return self.ledger.adapter.down_proj(layer).weight.detach()

    def state(self) -> dict[str, object]:
        return {"editor": self.editor.state_dict(), "ledger": self.ledger.state_dict()}


def d4s(layers: Sequence[int] = (1,), **settings: object) -> D4S:
    return D4S(**{"layers": layers, "covariance_weight": 2.0, "contexts": TEMPLATES, "target": FEW_STEPS, **settings})


def memit(layers: Sequence[int] = (1,), **settings: object) -> MEMIT:
    return MEMIT(**{"layers": layers, "covariance_weight": 2.0, "contexts": TEMPLATES, "target": FEW_STEPS, **settings})


class SummedMEMIT(ClosedFormEditor):
    """MEMIT's increments added up without measuring again: targets of the original model, no memory."""

    on_original = True
    memory = False


def same(one: object, other: object) -> bool:
    """Equal to the last bit, all the way down, but for the journal, whose records say when they were written."""
    if isinstance(one, dict):
        names = one.keys() - {"journal", "digest"}
        return names == other.keys() - {"journal", "digest"} and all(same(one[name], other[name]) for name in names)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def repeats(count: int) -> list[EditRequest]:
    return [replace(tiny_requests()[2], id=f"repeat {i}") for i in range(count)]


# ---- the nine --------------------------------------------------------------------------------------------------------


@every_mode
def test_1_single_edits_equal_one_joint_batch(mode: str) -> None:
    requests = tiny_requests()
    singles, batch = Run(d4s(residual=mode)), Run(d4s(residual=mode))
    for request in requests:
        singles.edit(request)
    batch.edit(*requests)
    torch.testing.assert_close(singles.delta(1), batch.delta(1), **CLOSE)
    torch.testing.assert_close(singles.weight(1), batch.weight(1), **CLOSE)


def test_1_counterexample_memit_forgets() -> None:
    """Else test 1 would say nothing about memory."""
    requests = tiny_requests()
    singles, batch = Run(memit()).stream(requests), Run(memit())
    batch.edit(*requests)
    assert (singles.delta(1) - batch.delta(1)).norm() > 0.05 * batch.delta(1).norm()


@every_mode
def test_1_first_batch_of_memit_and_d4s_are_the_same(mode: str) -> None:
    one, other = Run(d4s((1, 2, 3), residual=mode)), Run(memit((1, 2, 3), residual=mode))
    one.edit(*tiny_requests())
    other.edit(*tiny_requests())
    for layer in (1, 2, 3):
        torch.testing.assert_close(one.delta(layer), other.delta(layer), **CLOSE)


def test_2_order_does_not_matter() -> None:
    requests = tiny_requests()
    plain = Run(d4s()).stream(requests)
    for order in ((5, 4, 3, 2, 1, 0), (2, 0, 5, 1, 4, 3)):
        shuffled = Run(d4s()).stream([requests[i] for i in order])
        torch.testing.assert_close(shuffled.delta(1), plain.delta(1), **CLOSE)


@dataclass
class ByHand:
    """The released algorithm as one would write it down: hooks, whole passes, two sums and an inverse per layer."""

    layers: tuple[int, ...]
    mode: str
    weight: float = 2.0

    def __post_init__(self) -> None:
        self.model = tiny()
        self.modules = {layer: self.model.transformer.h[layer].mlp.c_proj for layer in self.layers}
        self.base = {layer: module.weight.clone() for layer, module in self.modules.items()}
        self.right = {layer: torch.zeros(32, 128, dtype=torch.float64) for layer in self.layers}  # sum r k^T
        self.gram = {layer: torch.zeros(128, 128, dtype=torch.float64) for layer in self.layers}  # sum k k^T
        self.deltas = dict(self.right)

    @torch.no_grad()
    def read(self, ids: tuple[int, ...], lookup: int, layer: int) -> tuple[Tensor, Tensor]:
        """Key of ``layer`` and output of the last edited layer, at the lookup token of the whole prompt."""
        found: dict[str, Tensor] = {}
        hooks = [
            self.modules[layer].register_forward_pre_hook(lambda m, a: found.update(key=a[0][0, lookup])),
            self.model.transformer.h[self.layers[-1] + 1].register_forward_pre_hook(
                lambda m, a: found.update(hidden=a[0][0, lookup])
            ),
        ]
        self.model(input_ids=torch.tensor([ids]))
        for hook in hooks:
            hook.remove()
        return found["key"], found["hidden"]

    def edit(self, request: EditRequest, value: Tensor) -> None:
        self.restore()
        prompts = build_problem(tiny_tokenizer(), request, tuple(map(tuple, TEMPLATES))).prompts
        for index, layer in enumerate(self.layers):
            keys, states = zip(*(self.read(p.ids, p.lookup, layer) for p in prompts), strict=True)
            key = (keys[0] + (keys[1] + keys[2]) / 2) / 2  # mean of the two groups' means
            if index == 0 or self.mode == "remeasured":
                residual = value - states[0]
            share = len(self.layers) - (0 if self.mode == "uniform" else index)
            self.right[layer] += torch.outer(residual / share, key)
            self.gram[layer] += torch.outer(key, key)
            inverse = torch.linalg.inv(self.weight * gpt2_moments()[layer] + self.gram[layer])
            self.deltas[layer] = self.right[layer] @ inverse
            self.modules[layer].weight.copy_(self.base[layer] + self.deltas[layer].T)

    def restore(self) -> None:
        for layer, module in self.modules.items():
            module.weight.copy_(self.base[layer])


@every_mode
@pytest.mark.parametrize("layers", [(1,), (0, 1, 2)], ids=["one layer", "three layers"])
def test_3_recursive_solution_equals_the_direct_one(layers: tuple[int, ...], mode: str) -> None:
    requests = tiny_requests()[:4]
    run, book = Run(d4s(layers, residual=mode)), ByHand(layers, mode)
    for request in requests:
        run.editor.propose([request], requests)  # fits the targets; proposing twice changes nothing
        value = run.editor.targets[request.id][1].value
        run.edit(request, window=requests)
        book.edit(request, value)
        for layer in layers:
            torch.testing.assert_close(run.delta(layer), book.deltas[layer], **CLOSE)
            torch.testing.assert_close(run.weight(layer), book.modules[layer].weight, **CLOSE)


def test_4_add_then_remove_equals_never_added() -> None:
    """Removal by the formula of methods.md 0.6 (b) on the solver's own state."""
    requests = tiny_requests()
    full, spared = Run(d4s()), Run(d4s())
    steps = [full.edit(request).pending.steps[1][-1] for request in requests]
    for request in requests[:2] + requests[3:]:
        spared.edit(request)
    solver, expected = full.editor.solvers[1], spared.editor.solvers[1]
    key, residual = steps[2].keys, steps[2].residuals
    image = solver.inverse @ key
    kept = 1 - (key.T @ image).item()
    delta = solver.delta - (residual - solver.delta @ key) @ image.T / kept
    assert (solver.delta - expected.delta).norm() > 1e-2 * expected.delta.norm()
    torch.testing.assert_close(delta, expected.delta, **CLOSE)
    torch.testing.assert_close(solver.inverse + image @ image.T / kept, expected.inverse, **CLOSE)
    torch.testing.assert_close(solver.gram - key @ key.T, expected.gram, **CLOSE)
    torch.testing.assert_close(solver.cross - residual @ key.T, expected.cross, **CLOSE)


def test_5_state_does_not_grow() -> None:
    """The latest facts are columns, and folded into the matrices: every two here."""

    def numbers(value: object) -> int:
        if isinstance(value, dict):
            return sum(map(numbers, value.values()))
        return value.numel() if isinstance(value, Tensor) else 1

    run = Run(d4s((1, 2)))
    for solver in run.editor.solvers.values():
        solver.fold_every = 2
    sizes = []
    for request in tiny_requests():
        run.edit(request)
        state = run.editor.state_dict()
        del state["known"]  # a kilobyte an edit, to find it by
        sizes.append((numbers(state), numbers(run.ledger.state_dict()["deltas"])))
    folded, between = sizes[1::2], sizes[2::2]
    assert len(set(folded)) == len(set(between)) == 1
    assert between[0][0] - folded[0][0] == 2 * (128 + 32 + 128 + 1)  # key, residual, factor, sign; two layers
    assert between[0][1] == folded[0][1] == sizes[0][1]


@pytest.mark.parametrize(("make", "cut"), [(d4s, 0), (d4s, 1), (d4s, 3), (memit, 1)])
def test_6_resumed_stream_equals_the_uninterrupted_one(make: type[ClosedFormEditor], cut: int, tmp_path: Path) -> None:
    """Bit for bit, from a file, into an editor of another seed: contexts are part of the state."""
    requests = tiny_requests()[:4]
    whole = Run(make((1, 2), contexts="sampled", seed=3)).stream(requests)
    part = Run(make((1, 2), contexts="sampled", seed=3))
    for request in requests[:cut]:
        part.edit(request, window=requests)
    save_tree(part.state(), tmp_path / "state")
    saved = load_tree(tmp_path / "state")

    resumed = Run(make((1, 2), contexts="sampled", seed=4))
    assert resumed.editor.templates != whole.editor.templates
    resumed.ledger.load_state_dict(saved["ledger"])
    resumed.editor.load_state_dict(saved["editor"])
    for request in requests[cut:]:
        resumed.edit(request, window=requests)
    assert same(resumed.state(), whole.state())
    for layer in (1, 2):
        torch.testing.assert_close(resumed.weight(layer), whole.weight(layer), **EXACT)


def test_7_strong_prior_writes_nothing() -> None:
    run = Run(d4s((1, 2), covariance_weight=1e14)).stream(tiny_requests())
    for layer in (1, 2):
        assert run.delta(layer).abs().max() < 1e-9


@every_mode
def test_7_weak_prior_fits_independent_keys_exactly(mode: str) -> None:
    run = Run(d4s(covariance_weight=1e-9, residual=mode))
    steps = [run.edit(request).pending.steps[1][-1] for request in tiny_requests()]
    for step in steps:  # all facts hold at the end, not only the last
        torch.testing.assert_close(run.delta(1) @ step.keys, step.residuals, rtol=0, atol=1e-5)  # lambda x condition


@torch.no_grad()
def test_7_weak_prior_reaches_the_target_states() -> None:
    """The same, read off the edited model: its state at the lookup token is z."""
    requests = tiny_requests()
    run = Run(d4s(covariance_weight=1e-9, contexts="plain"))
    run.editor.propose(requests, requests)
    targets = {id: target for id, (_, target) in run.editor.targets.items()}
    run.stream(requests)
    for request in requests:
        prompt = build_problem(tiny_tokenizer(), request, (("{}",),)).prompts[0]
        ids = torch.tensor([prompt.ids])
        first, calls = run.ledger.adapter.record_calls(ids, torch.ones_like(ids))
        state = run.ledger.adapter.run_layers(first, calls, 0, 2)[0, prompt.lookup]
        torch.testing.assert_close(state, targets[request.id].value, rtol=0, atol=1e-5)  # lambda x condition


@pytest.mark.parametrize("other", [SummedMEMIT, MEMIT], ids=["summed", "measured again"])
def test_8_repeated_edit_moves_the_weights_less_than_memit(other: type[ClosedFormEditor]) -> None:
    settings = {"layers": (1,), "covariance_weight": 2.0, "contexts": TEMPLATES, "target": FEW_STEPS}
    ours, theirs = Run(D4S(**settings)), Run(other(**settings))
    sizes = []
    for request in repeats(6):
        ours.edit(request)
        theirs.edit(request)
        sizes.append((ours.delta(1).abs().mean().item(), theirs.delta(1).abs().mean().item()))
    assert sizes[0][0] == pytest.approx(sizes[0][1], rel=1e-9)  # the first edit is the same
    assert all(mine < memits for mine, memits in sizes[1:])
    increments = [b[0] - a[0] for a, b in pairwise(sizes)]
    assert all(later < 0.9 * earlier for earlier, later in pairwise(increments))  # saturates


def test_8_summed_memit_grows_in_proportion() -> None:
    """t edits write t times the first (methods.md, section 1): the growth that D4S is there to stop."""
    run = Run(SummedMEMIT(layers=(1,), covariance_weight=2.0, contexts=TEMPLATES, target=FEW_STEPS))
    run.edit(*repeats(1))
    first = run.delta(1).clone()
    for request in repeats(5)[1:]:
        run.edit(request)
    torch.testing.assert_close(run.delta(1), 5 * first, **CLOSE)


@torch.no_grad()
def test_9_returned_model_is_the_edited_one() -> None:
    run = Run(d4s((1, 2)))
    before = deepcopy(run.model.state_dict())
    ids = torch.tensor([tiny_tokenizer()(tiny_requests()[0].text)["input_ids"]])
    logits = run.model(input_ids=ids).logits
    run.stream(tiny_requests())
    after = run.model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == list(run.ledger.names.values())
    for layer in (1, 2):
        expected = before[run.ledger.names[layer]] + run.delta(layer).T
        torch.testing.assert_close(run.weight(layer), expected, **EXACT)
    assert (run.model(input_ids=ids).logits - logits).abs().max() > 1e-2
    run.ledger.restore_base()
    torch.testing.assert_close(run.model(input_ids=ids).logits, logits, **EXACT)


# ---- proposals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [d4s, memit])
def test_proposing_changes_neither_model_nor_state(make: type[ClosedFormEditor]) -> None:
    run = Run(make((1, 2)))
    run.edit(tiny_requests()[0])
    state, model = deepcopy(run.state()), deepcopy(run.model.state_dict())
    first = run.editor.propose(tiny_requests()[1:2], tiny_requests())
    proposed = run.state()
    ahead = proposed["editor"].pop("targets")  # fitted ahead, they spare the work and change no result
    assert set(ahead) == ({request.id for request in tiny_requests()} if make is d4s else set())
    assert state["editor"].pop("targets") == {}
    assert same(proposed, state)
    torch.testing.assert_close(run.model.state_dict(), model, **EXACT)
    again = run.editor.propose(tiny_requests()[1:2], tiny_requests())
    for one, other in zip(first.updates, again.updates, strict=True):
        torch.testing.assert_close(one.delta, other.delta, **EXACT)


def test_targets_of_d4s_do_not_depend_on_earlier_edits() -> None:
    fresh, used = Run(d4s()), Run(d4s())
    used.stream(tiny_requests()[:3])
    one, other = (run.edit(tiny_requests()[4]).pending.steps[1][-1] for run in (fresh, used))
    torch.testing.assert_close(one.keys, other.keys, **EXACT)
    torch.testing.assert_close(one.residuals, other.residuals, **EXACT)


def test_targets_of_memit_do() -> None:
    fresh, used = Run(memit()), Run(memit())
    used.stream(tiny_requests()[:3])
    one, other = (run.edit(tiny_requests()[4]).pending.steps[1][-1] for run in (fresh, used))
    assert (one.residuals - other.residuals).norm() > 1e-3


def test_refused_request_leaves_no_target_behind() -> None:
    """A corrected request under the id of a refused one is fitted anew."""
    run, clean = Run(d4s()), Run(d4s())
    wrong, right = tiny_requests()[0], replace(tiny_requests()[0], target_new="chess")
    run.editor.propose([wrong])  # never committed
    assert run.editor.propose([right]).entries[0].target_new == "chess"
    torch.testing.assert_close(run.edit(right).updates[0].delta, clean.edit(right).updates[0].delta, **EXACT)


def test_two_editors_in_one_process_are_independent() -> None:
    alone = Run(d4s()).stream(tiny_requests()[:2])
    one, other = Run(d4s()), Run(d4s())
    for request in tiny_requests()[:2]:
        one.edit(request)
        other.edit(tiny_requests()[5])
    torch.testing.assert_close(one.delta(1), alone.delta(1), **CLOSE)


def test_prepare_starts_again() -> None:
    """One editor object, two models: nothing of the first stream is left in the second."""
    editor = d4s()
    Run(editor).stream(tiny_requests()[:3])
    again = Run(editor).stream(tiny_requests()[3:])
    assert same(again.state(), Run(d4s()).stream(tiny_requests()[3:]).state())


def test_state_of_other_layers_is_refused() -> None:
    state = Run(d4s((1, 2))).editor.state_dict()
    with pytest.raises(ValueError, match=r"edits layers \[1, 2\], this editor \[1\]"):
        Run(d4s((1,))).editor.load_state_dict(state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": []}, "layers must be"),
        ({"layers": [2, 1]}, "layers must be"),
        ({"layers": [1, 1]}, "layers must be"),
        ({"layers": [-1]}, "layers must be"),
        ({"covariance_weight": 0.0}, "covariance_weight"),
        ({"covariance_weight": float("nan")}, "covariance_weight"),
        ({"residual": "spread"}, "residual must be"),
        ({"ridge": -1.0}, "ridge must not"),
        ({"ridge": float("nan")}, "ridge must not"),
        ({"contexts": "smapled"}, "contexts must be"),
        ({"contexts": [["no place"]]}, "exactly one {}"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        D4S(**settings)


def test_layer_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="layer 4 does not exist: this model has layers 0 to 3"):
        Run(d4s((1, 4)))


# ---- half precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_the_cast_sum_after_five_edits(dtype: torch.dtype) -> None:
    model = tiny("llama", dtype)
    moments = read_moments(ModelAdapter(tiny("llama")), (1, 2))
    run = Run(d4s((1, 2)), model, moments)
    base = {layer: run.weight(layer).clone() for layer in (1, 2)}
    for request in tiny_requests()[:5]:
        run.edit(request)
    for layer in (1, 2):
        assert run.delta(layer).dtype == torch.float64
        expected = (base[layer].double() + run.delta(layer)).to(dtype)
        torch.testing.assert_close(run.weight(layer), expected, **EXACT)
        assert not torch.equal(run.weight(layer), base[layer])
        torch.testing.assert_close(run.delta(layer), run.editor.solvers[layer].solve(), **EXACT)
