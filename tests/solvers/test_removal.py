"""Taking facts out of a solver again: the result is that of a solver that never had them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_edit.errors import ArgumentError
from lit_edit.solvers import recursive_least_squares
from lit_edit.solvers.functional import FactsError
from lit_edit.solvers.recursive_least_squares import Block, RidgeSolver
from lit_edit.solvers.storage import SolverStorage
from tests.solvers.test_recursive_least_squares import Facts, draw, joint, make_facts, make_prior, same_state, summed

D_OUT, D_IN = 5, 8
NEVER = 10**6
ROUND_OFF = {"rtol": 1e-10, "atol": 1e-10}


def solver_of(facts: Facts, d_in: int = D_IN, **options: object) -> RidgeSolver:
    solver = RidgeSolver(make_prior(d_in=d_in), D_OUT, **options)
    for keys, residuals in facts:
        solver.update(keys, residuals)
    return solver


def take_out(solver: RidgeSolver, facts: Facts) -> Tensor:
    """Remove facts at once; return what the step promised."""
    keys, residuals = (torch.cat(parts, 1) for parts in zip(*facts, strict=True))
    step = solver.preview_removal(keys, residuals)
    solver.absorb(step)
    return step.delta


def same_solver(one: RidgeSolver, other: RidgeSolver) -> None:
    """All that a solver is asked for, up to round-off."""
    for name in ("delta", "inverse", "gram", "cross"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), **ROUND_OFF, msg=lambda m, n=name: n + m)
    keys = draw(one.d_in, 2, seed=77)
    step, expected = one.preview(keys, draw(D_OUT, 2, seed=78)), other.preview(keys, draw(D_OUT, 2, seed=78))
    torch.testing.assert_close(step.delta, expected.delta, **ROUND_OFF)


# ---- add, remove: as if never added ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fold_every", [1, 2, 64])
@pytest.mark.parametrize("sizes", [(1,), (1, 1, 1), (3, 1, 4), (2, 9, 1)], ids=str)
@pytest.mark.parametrize("d_in", [D_IN, 24])
def test_removed_facts_were_never_there(sizes: tuple[int, ...], fold_every: int, d_in: int) -> None:
    facts = make_facts(sizes, d_in=d_in)
    for index, out in enumerate(facts):
        rest = facts[:index] + facts[index + 1 :]
        solver = solver_of(facts, d_in, fold_every=fold_every)
        before = solver.delta.clone()
        promised = take_out(solver, [out])
        assert solver.refactorisations == 0
        torch.testing.assert_close(solver.delta, promised, **ROUND_OFF)
        expected = joint(rest, make_prior(d_in=d_in)) if rest else torch.zeros(D_OUT, d_in, dtype=torch.float64)
        torch.testing.assert_close(solver.delta, expected, **ROUND_OFF)
        assert not torch.allclose(before, expected, atol=1e-3)
        same_solver(solver, solver_of(rest, d_in, fold_every=fold_every))


@pytest.mark.parametrize("fold_every", [1, 2, NEVER])
@pytest.mark.parametrize("out", [[0, 2], [1, 3, 4], [0, 1, 2, 3, 4]], ids=str)
def test_several_at_once_and_one_after_another(out: list[int], fold_every: int) -> None:
    facts = make_facts((1, 2, 1, 3, 1))
    rest = [fact for index, fact in enumerate(facts) if index not in out]
    at_once, one_by_one = (solver_of(facts, fold_every=fold_every) for _ in range(2))
    take_out(at_once, [facts[index] for index in out])
    for index in reversed(out):
        take_out(one_by_one, [facts[index]])
    expected = solver_of(rest, fold_every=fold_every)
    same_solver(at_once, expected)
    same_solver(one_by_one, expected)


@pytest.mark.parametrize("fold_every", [1, 3, NEVER])
def test_part_of_a_block_can_go(fold_every: int) -> None:
    ((keys, residuals), *others) = make_facts((4, 2))
    solver = solver_of([(keys, residuals), *others], fold_every=fold_every)
    take_out(solver, [(keys[:, [1, 3]], residuals[:, [1, 3]])])
    same_solver(solver, solver_of([(keys[:, [0, 2]], residuals[:, [0, 2]]), *others]))


def test_many_rounds_of_adding_and_removing_do_not_add_up_errors() -> None:
    kept, passing = make_facts((2, 1)), make_facts((1, 1, 2), seed=500)
    solver = solver_of(kept, fold_every=4)
    for _ in range(60):
        for keys, residuals in passing:
            solver.update(keys, residuals)
        take_out(solver, passing)
    same_solver(solver, solver_of(kept))


def test_a_preview_changes_nothing() -> None:
    facts = make_facts((2, 3))
    solver = solver_of(facts, fold_every=2)
    before = solver.state_dict()
    solver.preview_removal(*facts[0])
    assert same_state(solver.state_dict(), before)


def test_what_cannot_be_removed_is_refused() -> None:
    facts = make_facts((2,))
    keys, residuals = facts[0]
    solver = solver_of(facts)
    with pytest.raises(ValueError, match="keys must be"):
        solver.preview_removal(keys[:3], residuals)
    with pytest.raises(FactsError, match="NaN"):
        solver.preview_removal(keys * torch.nan, residuals)
    with pytest.raises(ValueError, match="use preview_exchange"):
        solver_of(facts, memory=False).preview_removal(keys, residuals)


# ---- facts that outweigh the prior -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fold_every", [1, NEVER])
@pytest.mark.parametrize("scale", [1e4, 1e5, 1e6, 1e7])
def test_a_fact_that_outweighs_the_prior_is_removed_by_factorising_anew(scale: float, fold_every: int) -> None:
    facts = make_facts((1, 2, 1))
    heavy = (scale * draw(D_IN, 1, seed=7), draw(D_OUT, 1, seed=8))
    solver = solver_of([facts[0], heavy, *facts[1:]], fold_every=fold_every)
    before = solver.refactorisations
    promised = take_out(solver, [heavy])
    assert solver.refactorisations == before + 1  # the difference has lost its digits, whatever it looks like
    expected = joint(facts, make_prior())
    tolerance = 1e-10 + scale**2 * 1e-15  # what the sums have lost beside so large a number
    torch.testing.assert_close(promised, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(solver.delta, expected, rtol=0, atol=tolerance)
    more = make_facts((2,), seed=900)
    solver.update(*more[0])
    torch.testing.assert_close(solver.delta, joint([*facts, *more], make_prior()), rtol=0, atol=tolerance)
    assert solver.drift() < tolerance


def test_ordinary_facts_are_not_factorised_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(matrix: Tensor) -> Tensor:
        raise AssertionError("factorised anew")

    facts = make_facts((1, 3, 2))
    solver = solver_of(facts)
    monkeypatch.setattr(recursive_least_squares, "inverse_spd", never)
    take_out(solver, facts[1:2])
    heavy = (1e5 * draw(D_IN, 1, seed=7), draw(D_OUT, 1, seed=8))
    solver.update(*heavy)
    with pytest.raises(AssertionError, match="factorised anew"):
        take_out(solver, [heavy])


def test_facts_that_were_never_in_are_found_out() -> None:
    """Removing what is not there would leave no positive matrix: an error, and the state stays."""
    solver = solver_of(make_facts((1, 1)))
    before = solver.state_dict()
    with pytest.raises(ArgumentError, match="not positive definite"):
        take_out(solver, [(100 * draw(D_IN, 1, seed=1234), draw(D_OUT, 1, seed=1))])
    assert same_state(solver.state_dict(), before)


@pytest.mark.parametrize("inverse", ["float64", "float32"])
def test_a_single_precision_inverse_keeps_its_promise(inverse: str) -> None:
    facts = make_facts((1, 2, 1, 3))
    solver = solver_of(facts, fold_every=2, storage=SolverStorage(inverse=inverse))
    take_out(solver, facts[1:3])
    expected = joint([facts[0], facts[3]], make_prior())
    error = float((solver.delta - expected).norm() / expected.norm())
    assert error < (1e-10 if inverse == "float64" else 1e-3)
    if inverse == "float32":
        assert error > 1e-12  # the case tests what it says


# ---- forks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("fold_every", [1, 3, NEVER])
def test_a_fork_does_not_change_its_solver(memory: bool, fold_every: int) -> None:
    facts = make_facts((1, 2, 3))
    heavy = (1e5 * draw(D_IN, 1, seed=7), draw(D_OUT, 1, seed=8))
    solver = solver_of([*facts, heavy], fold_every=fold_every, memory=memory)
    before = solver.state_dict()
    fork = solver.fork()
    steps = []
    for keys, residuals in make_facts((2, 5, 1), seed=300):
        steps.append(fork.preview(keys, residuals))
        fork.absorb(steps[-1])
    if memory:
        for fact in (facts[1], heavy):  # the second is factorised anew
            steps.append(fork.preview_removal(*fact))
            fork.absorb(steps[-1])
    else:
        steps.append(fork.preview_exchange([Block(*facts[1])], []))
        fork.absorb(steps[-1])
    fork.delta.add_(0.0)
    assert same_state(solver.state_dict(), before)
    for step in steps:  # and what was tried brings the solver where the fork is
        solver.absorb(step)
    torch.testing.assert_close(solver.delta, fork.delta, rtol=0, atol=1e-6)
    assert not same_state(solver.state_dict(), before)
    assert solver.fold_every == fold_every


def test_a_fork_of_a_fork_is_apart_as_well() -> None:
    facts = make_facts((1, 2))
    solver = solver_of(facts)
    one, other = solver.fork(), solver.fork()
    one.update(*make_facts((1,), seed=40)[0])
    take_out(other, facts[:1])
    torch.testing.assert_close(one.delta, joint([*facts, *make_facts((1,), seed=40)], make_prior()), **ROUND_OFF)
    torch.testing.assert_close(other.delta, joint(facts[1:], make_prior()), **ROUND_OFF)
    torch.testing.assert_close(solver.delta, joint(facts, make_prior()), **ROUND_OFF)


# ---- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold_every", [1, 4, NEVER])
@pytest.mark.parametrize("heavy", [False, True], ids=["down-dated", "factorised anew"])
def test_a_state_with_facts_removed_goes_on_bit_for_bit(fold_every: int, heavy: bool) -> None:
    facts = make_facts((1, 2, 1))
    out = (1e5 * draw(D_IN, 1, seed=7), draw(D_OUT, 1, seed=8)) if heavy else facts[1]
    solver = solver_of([*facts, out] if heavy else facts, fold_every=fold_every)
    take_out(solver, [out])
    signs = solver.state_dict()["signs"]
    if fold_every == NEVER and not heavy:
        assert signs.tolist() == [[1.0] * 4 + [-1.0] * 2]
    fresh = RidgeSolver(make_prior(), D_OUT, fold_every=fold_every)
    fresh.load_state_dict(solver.state_dict())
    assert same_state(fresh.state_dict(), solver.state_dict())
    for one in (solver, fresh):
        one.update(*make_facts((2,), seed=60)[0])
        take_out(one, facts[:1])
    assert same_state(fresh.state_dict(), solver.state_dict())


def test_a_state_without_signs_is_refused() -> None:
    facts = make_facts((1, 2))
    solver = solver_of(facts)
    before = solver.state_dict()
    state = {name: value for name, value in before.items() if name != "signs"}
    with pytest.raises(ValueError, match="signs does not fit"):
        solver.load_state_dict(state)
    assert same_state(solver.state_dict(), before)


# ---- without memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold_every", [1, 3, NEVER])
def test_exchange_against_the_formula(fold_every: int) -> None:
    facts = make_facts((3, 1, 2, 2))
    prior = make_prior()
    solver = solver_of(facts, memory=False, fold_every=fold_every)
    (keys, residuals), second = facts[0], facts[1]
    part = (keys[:, [0, 2]], residuals[:, [0, 2]])  # the middle fact of the first block goes, and the second block
    step = solver.preview_exchange([Block(*facts[0]), Block(*second)], [Block(*part)])
    torch.testing.assert_close(solver.delta, summed(facts, prior), **ROUND_OFF)
    solver.absorb(step)
    expected = summed([part, *facts[2:]], prior)
    torch.testing.assert_close(solver.delta, expected, **ROUND_OFF)
    solver.absorb(solver.preview_exchange([Block(*part)], [Block(*facts[0]), Block(*second)]))
    torch.testing.assert_close(solver.delta, summed(facts, prior), **ROUND_OFF)
    solver.update(*make_facts((2,), seed=70)[0])
    torch.testing.assert_close(solver.delta, summed([*facts, *make_facts((2,), seed=70)], prior), **ROUND_OFF)


def test_an_exchange_leaves_a_state_that_goes_on() -> None:
    facts = make_facts((3, 1))
    solver = solver_of(facts, memory=False, fold_every=2)
    solver.absorb(solver.preview_exchange([Block(*facts[0])], []))
    fresh = RidgeSolver(make_prior(), D_OUT, memory=False, fold_every=2)
    fresh.load_state_dict(solver.state_dict())
    for one in (solver, fresh):
        one.update(*make_facts((1,), seed=70)[0])
    assert same_state(fresh.state_dict(), solver.state_dict())
    torch.testing.assert_close(
        fresh.delta, summed([facts[1], *make_facts((1,), seed=70)], make_prior()), **ROUND_OFF
    )  # fmt: skip


def test_empty_blocks_change_nothing() -> None:
    facts = make_facts((2,))
    solver = solver_of(facts, memory=False)
    empty = Block(torch.empty(D_IN, 0), torch.empty(D_OUT, 0))
    assert torch.equal(solver.preview_exchange([empty], [empty]).delta, solver.delta)


# ---- a fact alone ----------------------------------------------------------------------------------------------------


def alone_by_formula(keys: Tensor) -> tuple[Tensor, Tensor]:
    projected = torch.linalg.inv(make_prior()) @ keys
    return projected, 1 + (keys * projected).sum(0)


@pytest.mark.parametrize("removal", [False, True], ids=["as it is", "after a removal anew"])
@pytest.mark.parametrize("count", [0, 3, 12])
@pytest.mark.parametrize("fold_every", [1, 2, NEVER])
def test_alone_knows_of_no_other_fact(fold_every: int, count: int, removal: bool) -> None:
    solver = solver_of(make_facts((1,) * count), fold_every=fold_every)
    if removal:
        heavy = (1e5 * draw(D_IN, 1, seed=7), draw(D_OUT, 1, seed=8))
        solver.update(*heavy)
        take_out(solver, [heavy])
    keys, residuals = draw(D_IN, 3, seed=5), draw(D_OUT, 3, seed=6)
    projected, scale = solver.alone(keys)
    expected = alone_by_formula(keys)
    torch.testing.assert_close(projected, expected[0], **ROUND_OFF)
    torch.testing.assert_close(scale, expected[1], **ROUND_OFF)
    for column in range(3):  # the update of one fact is its joint solution with nothing else
        one = slice(column, column + 1)
        update = residuals[:, one] / scale[one] @ projected[:, one].T
        torch.testing.assert_close(update, joint([(keys[:, one], residuals[:, one])], make_prior()), **ROUND_OFF)


def test_alone_does_not_drift_with_the_inverse() -> None:
    """The inverse that is carried along loses digits; a fact alone is solved on the prior itself."""
    solver = solver_of(make_facts((1,) * 4), fold_every=2, drift_bound=1e9)
    with torch.no_grad():
        solver._inverse.mul_(1.01)
    assert solver.drift() > 1e-3
    keys = draw(D_IN, 2, seed=5)
    torch.testing.assert_close(solver.alone(keys)[0], alone_by_formula(keys)[0], **ROUND_OFF)


def test_alone_is_the_same_after_a_restart() -> None:
    solver = solver_of(make_facts((1,) * 5), fold_every=2)
    fresh = RidgeSolver(make_prior(), D_OUT, fold_every=2)
    fresh.load_state_dict(solver.state_dict())
    keys = draw(D_IN, 2, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(solver.alone(keys), fresh.alone(keys), strict=True))
    solver.update(*make_facts((1,), seed=80)[0])
    assert all(torch.equal(a, b) for a, b in zip(solver.alone(keys), fresh.alone(keys), strict=True))
