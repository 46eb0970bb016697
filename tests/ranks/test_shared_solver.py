"""A solver shared by ranks against a plain one that sees the same facts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_edit.devices.ranks import Ranks
from lit_edit.solvers.recursive_least_squares import Block, RidgeSolver, RidgeStep
from lit_edit.solvers.shared import SharedSolver, Solver
from lit_edit.solvers.storage import SolverStorage
from tests.ranks.together import Found, raised, together
from tests.solvers.test_recursive_least_squares import ALWAYS, Facts, draw, joint, make_facts, make_prior

FOLD = 4
SHAPES = {"small": (5, 8), "wide": (96, 160)}
BLOCKS = (1, 3, 2, 1, 5)  # more than FOLD facts: some are folded, some are columns
HEAVY = 1e6
ROUND_OFF = {"rtol": 1e-9, "atol": 1e-9}


def plain_solver(shape: tuple[int, int], **options: Any) -> RidgeSolver:
    return RidgeSolver(make_prior(d_in=shape[1]) + 0.1 * torch.eye(shape[1]), shape[0], fold_every=FOLD, **options)


def shared_solver(ranks: Ranks, shape: tuple[int, int], **options: Any) -> SharedSolver:
    def make() -> RidgeSolver:
        assert ranks.leads
        return plain_solver(shape, **options)

    return SharedSolver(ranks, make, shape, options.get("memory", True), torch.device("cpu"))


def facts_of(shape: tuple[int, int], sizes: tuple[int, ...] = BLOCKS, seed: int = 0) -> Facts:
    return make_facts(sizes, seed, shape[1], shape[0])


def take(solver: Solver, step: RidgeStep) -> Tensor:
    """Absorb a step and return what it promised."""
    promised = step.delta.clone()
    solver.absorb(step)
    return promised


def story(solver: Solver, shape: tuple[int, int]) -> dict[str, Tensor]:
    """All that a stream with memory asks of a solver."""
    facts, seen = facts_of(shape), {}
    for number, block in enumerate(facts):
        seen[f"added {number}"] = take(solver, solver.preview(*block))
        seen[f"solution {number}"] = solver.delta.clone()
    seen["tried"] = solver.preview(*facts_of(shape, (2,), 300)[0]).delta
    seen["as before"] = solver.delta.clone()
    seen["removed a folded block"] = take(solver, solver.preview_removal(*facts[1]))
    seen["removed the last"] = take(solver, solver.preview_removal(*facts[4]))
    heavy = (HEAVY * draw(shape[1], 1, seed=7), draw(shape[0], 1, seed=8))
    seen["heavy"] = take(solver, solver.preview(*heavy))
    step = solver.preview_removal(*heavy)
    seen["removed by factorising anew"] = take(solver, step)
    fork = solver.fork()
    for number, block in enumerate(facts_of(shape, (FOLD, 2, FOLD), 400)):
        seen[f"fork {number}"] = take(fork, fork.preview(*block))
    fork.absorb(fork.preview_removal(*facts[0]))
    seen["fork"] = fork.delta.clone()
    seen["after the fork"] = solver.delta.clone()
    seen["a fork of a fork"] = fork.fork().delta.clone()
    for side, value in zip(("projected", "scale"), solver.alone(facts[2][0]), strict=True):
        seen[f"alone {side}"] = value
    seen["added again"] = take(solver, solver.preview(*facts[4]))
    return seen


def forgetful_story(solver: Solver, shape: tuple[int, int]) -> dict[str, Tensor]:
    """The same without memory: blocks are exchanged."""
    facts, seen = facts_of(shape), {}
    for number, block in enumerate(facts):
        seen[f"added {number}"] = take(solver, solver.preview(*block))
    old, new = Block(*facts[1]), Block(*facts_of(shape, (2,), 300)[0])
    seen["exchanged"] = take(solver, solver.preview_exchange([old], [new]))
    seen["taken out"] = take(solver, solver.preview_exchange([Block(*facts[3]), new], []))
    fork = solver.fork()
    fork.absorb(fork.preview(*facts[1]))
    seen["fork"] = fork.delta.clone()
    seen["solution"] = solver.delta.clone()
    return seen


OPTIONS = {
    "float64": {},
    "float32": {"storage": SolverStorage(inverse="float32")},
    "anew at each fold": {"drift_bound": ALWAYS},
}
STORIES = {True: story, False: forgetful_story}


def tell_stories(ranks: Ranks) -> Found:
    """All shapes, memories and options, shared and, on the leader, plain as well."""
    found: Found = {}
    for (shape_name, shape), memory, (option, options) in product(SHAPES.items(), (True, False), OPTIONS.items()):
        case = f"{shape_name} {memory} {option}"
        shared = shared_solver(ranks, shape, memory=memory, **options)
        found |= {f"{case} shared {name}": value for name, value in STORIES[memory](shared, shape).items()}
        assert shared.prior_checksum == plain_solver(shape).prior_checksum
        assert (shared._own is None) == (not ranks.leads)
        if ranks.leads:
            plain = plain_solver(shape, memory=memory, **options)
            found |= {f"{case} plain {name}": value for name, value in STORIES[memory](plain, shape).items()}
            found[f"{case} anew"] = plain.refactorisations
        found[f"{case} kept"] = shared._delta.numel()
    return found


@pytest.fixture(scope="module", params=[2, 3])
def told(request: pytest.FixtureRequest) -> list[Found]:
    return together(request.param, tell_stories)


@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("option", sorted(OPTIONS))
def test_all_ranks_have_the_plain_solution_bit_for_bit(
    told: list[Found], shape: str, memory: bool, option: str
) -> None:
    leader, *followers = told
    case = f"{shape} {memory} {option}"
    names = [name.removeprefix(f"{case} shared ") for name in leader if name.startswith(f"{case} shared ")]
    assert len(names) > 8
    for name in names:
        for found in told:
            assert torch.equal(found[f"{case} shared {name}"], leader[f"{case} plain {name}"]), name
    assert leader[f"{case} kept"] == 0  # the solution is the solver's there
    assert all(found[f"{case} kept"] for found in followers)
    anew = leader[f"{case} anew"]
    assert anew > 2 if memory and option == "anew at each fold" else anew >= memory


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_the_plain_solution_is_right(told: list[Found], shape: str) -> None:
    """What the comparison above rests on."""
    leader, case = told[0], f"{shape} True float64 plain"
    facts, prior = facts_of(SHAPES[shape]), plain_solver(SHAPES[shape])._prior
    torch.testing.assert_close(leader[f"{case} solution 4"], joint(facts, prior), **ROUND_OFF)
    rest = [facts[index] for index in (0, 2, 3)]
    for name in ("removed by factorising anew", "after the fork"):
        # rounding of sums beside a number whose square is 1e12
        torch.testing.assert_close(leader[f"{case} {name}"], joint(rest, prior), rtol=0, atol=1e-3)
    assert torch.equal(leader[f"{case} as before"], leader[f"{case} solution 4"])
    assert not torch.allclose(leader[f"{case} fork 2"], leader[f"{case} after the fork"], atol=1e-3)


# ---- saving and loading ----------------------------------------------------------------------------------------------


def save_and_load(ranks: Ranks, memory: bool) -> Found:
    shape, facts = SHAPES["small"], facts_of(SHAPES["small"])
    solver = shared_solver(ranks, shape, memory=memory)
    for block in facts[:3]:
        solver.absorb(solver.preview(*block))
    saved, not_copied = solver.state_dict(), solver.state_dict(copy=False)
    found: Found = {f"saved {name}": value for name, value in split(saved)[0].items()}
    found |= {f"saved {name}": value.clone() for name, value in split(saved)[1].items()}
    assert isinstance(saved["delta"], Tensor)
    found["own"] = not_copied["delta"] is solver.delta
    found["copied"] = saved["delta"].data_ptr() != solver.delta.data_ptr()
    # Every rank reads the same file, the leader's.
    data, tensors = ranks.lead(lambda: split(saved))
    state = data | {name: value.clone() for name, value in tensors.items()}
    for block in facts[3:]:
        solver.absorb(solver.preview(*block))
    found["went on"] = solver.delta.clone()

    again, plain = shared_solver(ranks, shape, memory=memory), plain_solver(shape, memory=memory)
    again.load_state_dict(state)
    plain.load_state_dict(state)
    state["delta"].fill_(7.0)  # theirs by now
    found |= {"loaded": again.delta.clone(), "loaded plain": plain.delta.clone()}
    for block in facts[3:]:
        for one in (again, plain):
            one.absorb(one.preview(*block))
    found |= {"loaded and went on": again.delta.clone(), "plain and went on": plain.delta.clone()}

    back = shared_solver(ranks, shape, memory=memory)
    back.load_state_dict(plain.state_dict())
    found["from plain"] = back.delta.clone()
    found["from plain, tried"] = back.preview(*facts[0]).delta
    found["plain, tried"] = plain.preview(*facts[0]).delta

    before = back.delta.clone()
    wrong = {**state, "keys": torch.zeros(3, 1, dtype=torch.float64)}
    found["wrong shape"] = raised(lambda: back.load_state_dict(wrong))
    found["other memory"] = raised(lambda: back.load_state_dict({**state, "memory": int(not memory)}))
    found["a follower's"] = raised(lambda: back.load_state_dict({"memory": int(memory), "delta": state["delta"]}))
    found["untouched"] = torch.equal(back.delta, before)
    found["usable"] = torch.equal(back.preview(*facts[0]).delta, found["from plain, tried"])
    return found


def split(state: dict[str, Tensor | int]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return {name: value for name, value in state.items() if name not in tensors}, tensors


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("memory", [True, False])
def test_a_state_is_loaded_by_all_and_by_one(memory: bool, size: int) -> None:
    everyone = together(size, save_and_load, memory)
    leader = everyone[0]
    assert "saved cross" in leader
    assert ("saved gram" in leader) == memory
    for rank, found in enumerate(everyone):
        if rank:
            assert {name for name in found if name.startswith("saved ")} == {"saved memory", "saved delta"}
        assert found["saved memory"] == int(memory)
        assert torch.equal(found["saved delta"], leader["saved delta"])
        assert found["own"]
        assert found["copied"]
        for name in ("loaded", "loaded plain"):
            assert torch.equal(found[name], leader["saved delta"])
        for name in ("went on", "loaded and went on", "plain and went on", "from plain"):
            assert torch.equal(found[name], leader["went on"]), name
        assert torch.equal(found["from plain, tried"], leader["plain, tried"])
        assert found["untouched"]
        assert found["usable"]
        assert found["wrong shape"] == ["ValueError", "the checkpoint's keys does not fit a layer of (5, 8)"]
        assert found["other memory"][0] == "ValueError"
        assert "another memory setting" in found["other memory"][1]
        assert found["a follower's"][0] == "ValueError"


# ---- errors ----------------------------------------------------------------------------------------------------------


def fail(ranks: Ranks) -> Found:
    shape, facts = SHAPES["small"], facts_of(SHAPES["small"])
    bad_prior: Callable[[], RidgeSolver] = partial(RidgeSolver, -torch.eye(shape[1]), shape[0])
    nan_prior: Callable[[], RidgeSolver] = partial(RidgeSolver, torch.full((8, 8), torch.nan), shape[0])
    found: Found = {}
    for name, make in (("bad prior", bad_prior), ("nan prior", nan_prior)):
        found[name] = raised(lambda make=make: SharedSolver(ranks, make, shape, True, torch.device("cpu")))
    solver = shared_solver(ranks, shape)
    solver.absorb(solver.preview(*facts[0]))
    before, (keys, residuals) = solver.delta.clone(), facts[1]
    found["nan keys"] = raised(lambda: solver.preview(keys * torch.nan, residuals))
    found["nan residuals"] = raised(lambda: solver.preview_removal(keys, residuals * torch.inf))
    stranger = (100 * draw(shape[1], 1, seed=1234), draw(shape[0], 1, seed=1))
    found["never in"] = raised(lambda: solver.preview_removal(*stranger))
    forgetful = shared_solver(ranks, shape, memory=False)
    found["no memory"] = raised(lambda: forgetful.preview_removal(keys, residuals))
    exchange = [Block(keys * torch.nan, residuals)]
    found["nan block"] = raised(lambda: forgetful.preview_exchange([], exchange))
    # What a rank alone sees is not asked for: the leader's facts count.
    own = (keys, residuals) if ranks.leads else (keys * torch.nan, residuals)
    found["leader's facts"] = solver.preview(*own).delta
    found["expected"] = solver.preview(keys, residuals).delta
    return found | {"untouched": torch.equal(solver.delta, before)}


@pytest.mark.parametrize("size", [2, 3])
def test_errors_are_the_same_on_all_ranks(size: int) -> None:
    for rank, found in enumerate(together(size, fail)):
        for name in ("bad prior", "never in"):
            assert found[name][0] == "ArgumentError", name
            assert "is not positive definite" in found[name][1]
        assert found["nan prior"][0] == "ArgumentError"
        assert found["nan prior"][1].startswith("prior holds NaN")
        for name, what in (("nan keys", "keys"), ("nan residuals", "residuals"), ("nan block", "keys")):
            assert found[name][0] == "FactsError", name
            assert found[name][1].startswith(f"{what} hold NaN or infinite values")
        assert found["no memory"][0] == ("ValueError" if rank == 0 else "RankError")
        assert "use preview_exchange" in found["no memory"][1]
        assert torch.equal(found["leader's facts"], found["expected"])
        assert found["untouched"]
