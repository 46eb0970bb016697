"""The solver over shapes at random: the textbook's formula, whatever the blocks; wrong shapes change nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_edit.solvers.functional import ridge_gain, ridge_update
from lit_edit.solvers.recursive_least_squares import RidgeSolver

MANY = settings(max_examples=60, deadline=None, database=None, derandomize=True)
CLOSE = {"rtol": 1e-7, "atol": 1e-9}  # priors of condition below 1e3, keys of size one


@dataclass(frozen=True)
class Problem:
    """A prior and blocks of facts.

    Attributes:
        prior: ``(d_in, d_in)``.
        d_out: Rows of the update.
        blocks: Keys ``(d_in, b)`` and residuals ``(d_out, b)``; ``b`` may be zero, or larger than ``d_in``.
    """

    prior: Tensor
    d_out: int
    blocks: list[tuple[Tensor, Tensor]]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Problems of any shape; keys may be repeated, within a block and over blocks, or zero."""
    d_in, d_out = draw(st.integers(1, 9)), draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    root = random(d_in, 2 * d_in)
    prior = draw(st.sampled_from([0.1, 1.0, 200.0])) * (root @ root.T / d_in + 0.1 * torch.eye(d_in, dtype=root.dtype))
    pool = torch.cat([random(d_in, 3), torch.zeros(d_in, 1, dtype=root.dtype)], 1)  # keys to be met again
    blocks = []
    for size in draw(st.lists(st.integers(0, 2 * d_in + 1), max_size=4)):
        chosen = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
        keys = pool[:, chosen] if draw(st.booleans()) else random(d_in, size)
        blocks.append((keys, random(d_out, size)))
    return Problem(prior, d_out, blocks)


def textbook(prior: Tensor, keys: Tensor, residuals: Tensor) -> Tensor:
    """``R K^T (Lambda + K K^T)^-1``, written down."""
    return residuals @ keys.T @ torch.linalg.inv(prior + keys @ keys.T)


def joined(problem: Problem) -> tuple[Tensor, Tensor]:
    """All facts as one block."""
    d_in = len(problem.prior)
    keys = [torch.zeros(d_in, 0, dtype=torch.float64), *(keys for keys, _ in problem.blocks)]
    residuals = [torch.zeros(problem.d_out, 0, dtype=torch.float64), *(residuals for _, residuals in problem.blocks)]
    return torch.cat(keys, 1), torch.cat(residuals, 1)


def solved(problem: Problem, **options: Any) -> RidgeSolver:
    """A solver that has met all blocks."""
    solver = RidgeSolver(problem.prior, problem.d_out, **options)
    for keys, residuals in problem.blocks:
        solver.update(keys, residuals)
    return solver


@MANY
@given(problem=problems(), fold_every=st.integers(1, 5))
def test_with_memory_all_blocks_are_one_problem(problem: Problem, fold_every: int) -> None:
    expected = textbook(problem.prior, *joined(problem))
    solver = solved(problem, fold_every=fold_every)
    assert solver.solve().shape == (problem.d_out, len(problem.prior))
    torch.testing.assert_close(solver.solve(), expected, **CLOSE)


@MANY
@given(problem=problems(), fold_every=st.integers(1, 5))
def test_without_memory_blocks_add_up(problem: Problem, fold_every: int) -> None:
    expected = sum((textbook(problem.prior, *block) for block in problem.blocks), torch.zeros(()))
    solver = solved(problem, memory=False, fold_every=fold_every)
    torch.testing.assert_close(solver.solve(), expected.expand_as(solver.solve()).double(), **CLOSE)


@MANY
@given(problem=problems())
def test_one_block_at_once_is_the_same(problem: Problem) -> None:
    keys, residuals = joined(problem)
    torch.testing.assert_close(ridge_update(keys, residuals, problem.prior), solved(problem).solve(), **CLOSE)


@MANY
@given(problem=problems(), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_facts_of_any_type_are_taken_as_they_are(problem: Problem, dtype: torch.dtype) -> None:
    rounded = [(keys.to(dtype), residuals.to(dtype)) for keys, residuals in problem.blocks]
    exact = [(keys.double(), residuals.double()) for keys, residuals in rounded]
    one, other = (solved(Problem(problem.prior, problem.d_out, blocks)) for blocks in (rounded, exact))
    assert torch.equal(one.solve(), other.solve())


@MANY
@given(problem=problems(), fold_every=st.integers(1, 5), memory=st.booleans())
def test_a_preview_changes_nothing(problem: Problem, fold_every: int, memory: bool) -> None:
    solver = solved(problem, fold_every=fold_every, memory=memory)
    before = solver.state_dict()
    for keys, residuals in problem.blocks:
        solver.preview(keys, residuals)
    assert same(before, solver.state_dict())


# ---- what does not fit -----------------------------------------------------------------------------------------------


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two states are equal bit for bit."""
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]
        for name, value in one.items()
    )


def spoiled(value: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Put a number into the keys."""

    def change(keys: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor]:
        keys = keys.clone()
        keys[0, -1] = value
        return keys, residuals

    return change


WRONG: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "one input too many": lambda k, r: (torch.cat([k, k[:1]]), r),
    "one input too few": lambda k, r: (k[1:], r),
    "one output too many": lambda k, r: (k, torch.cat([r, r[:1]])),
    "one output too few": lambda k, r: (k, r[1:]),
    "one key too many": lambda k, r: (torch.cat([k, k[:, :1]], 1), r),
    "one residual too many": lambda k, r: (k, torch.cat([r, r[:, :1]], 1)),
    "keys as a vector": lambda k, r: (k[:, 0], r[:, :1]),
    "residuals as a vector": lambda k, r: (k[:, :1], r[:, 0]),
    "a number for residuals": lambda k, r: (k, r.sum()),
    "a number for keys": lambda k, r: (k.sum(), r),
    "keys in a batch": lambda k, r: (k[None], r),
    "residuals in a batch": lambda k, r: (k, r[None]),
    "facts as rows": lambda k, r: (torch.cat([k, k], 1).T, torch.cat([r, r], 1).T),
    "nothing": lambda k, r: (torch.zeros(0), torch.zeros(0)),
    "NaN": spoiled(math.nan),
    "infinity": spoiled(math.inf),
    "infinity in residuals": lambda k, r: (k, r * -math.inf),
}


@pytest.mark.parametrize("wrong", WRONG)
@settings(MANY, max_examples=15)
@given(problem=problems(), fold_every=st.integers(1, 5), memory=st.booleans(), size=st.integers(1, 4))
def test_facts_that_do_not_fit_are_refused_and_change_nothing(
    wrong: str, problem: Problem, fold_every: int, memory: bool, size: int
) -> None:
    solver = solved(problem, fold_every=fold_every, memory=memory)
    before, solution = solver.state_dict(), solver.solve().clone()
    d_in = len(problem.prior)
    keys, residuals = WRONG[wrong](torch.ones(d_in, size).double(), torch.ones(problem.d_out, size).double())
    assume((keys.shape, residuals.shape) != ((d_in, d_in), (problem.d_out, d_in)))  # rows that happen to be a block
    for refuse in (solver.preview, solver.update):
        with pytest.raises(ValueError, match=r"keys|residuals"):
            refuse(keys, residuals)
    assert same(before, solver.state_dict())
    assert torch.equal(solver.solve(), solution)


@pytest.mark.parametrize("wrong", [name for name in WRONG if "output" not in name])  # it takes as many as there are
@pytest.mark.parametrize("d_out", [1, 2, 5])
def test_the_formula_alone_refuses_them_too(wrong: str, d_out: int) -> None:
    keys, residuals = WRONG[wrong](torch.ones(4, 3).double(), torch.ones(d_out, 3).double())
    with pytest.raises(ValueError, match=r"keys|residuals"):
        ridge_update(keys, residuals, torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (3, 2), (1, 3, 3)])
def test_priors_that_are_not_square_are_refused(shape: tuple[int, ...]) -> None:
    prior = torch.ones(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match="prior must be square"):
        RidgeSolver(prior, 2)
    with pytest.raises(ValueError, match="prior must be square"):
        ridge_update(torch.ones(3, 1), torch.ones(2, 1), prior)


@MANY
@given(problem=problems(), fold_every=st.integers(1, 5), memory=st.booleans(), data=st.data())
def test_a_state_of_another_shape_is_refused_and_changes_nothing(
    problem: Problem, fold_every: int, memory: bool, data: st.DataObject
) -> None:
    solver = solved(problem, fold_every=fold_every, memory=memory)
    before = solver.state_dict()
    state = solver.state_dict()
    name = data.draw(st.sampled_from(sorted(name for name, value in state.items() if isinstance(value, Tensor))))
    value = state[name]
    assert isinstance(value, Tensor)
    state[name] = data.draw(st.sampled_from([torch.cat([value, value[:1]]), value[None], value[1:], 3]))
    with pytest.raises(ValueError, match="does not fit"):
        solver.load_state_dict(state)
    assert same(before, solver.state_dict())
    solver.load_state_dict(before)
    assert same(before, solver.state_dict())


@MANY
@given(size=st.integers(0, 4), d_in=st.integers(1, 6))
def test_a_gain_has_the_shape_of_its_keys(size: int, d_in: int) -> None:
    keys = torch.randn(d_in, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    gain, factor = ridge_gain(keys.clone(), keys)
    assert gain.shape == factor.shape == (d_in, size)
