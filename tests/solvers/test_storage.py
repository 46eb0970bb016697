"""Where a solver keeps its matrices makes no difference, and what type P has only the difference that is stated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_edit import D4S
from lit_edit.solvers.recursive_least_squares import RidgeSolver
from lit_edit.solvers.storage import SolverStorage

D_IN, D_OUT = 48, 20


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(storage: SolverStorage, **options: int) -> RidgeSolver:
    rows = draw(400, D_IN, seed=99)
    return RidgeSolver(2.0 * rows.T @ rows / 400, D_OUT, storage=storage, **options)


def fill(solver: RidgeSolver, count: int = 30) -> RidgeSolver:
    for number in range(count):
        solver.update(draw(D_IN, 1, seed=number), draw(D_OUT, 1, seed=1000 + number))
    return solver


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_place_changes_nothing(offload: str, own_cache: Path) -> None:
    plain, placed = (fill(make(SolverStorage(offload=kind), fold_every=8)) for kind in ("none", offload))
    for name in ("delta", "gram", "cross", "inverse"):
        assert torch.equal(getattr(plain, name), getattr(placed, name)), name
    plain.refactorise()
    placed.refactorise()
    assert torch.equal(plain.delta, placed.delta)
    again = make(SolverStorage(offload=offload), fold_every=8)
    again.load_state_dict(placed.state_dict())
    assert torch.equal(fill(again).delta, fill(plain).delta)


def test_mapped_files_leave_nothing_behind(tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    solver = fill(make(SolverStorage(offload="disk", folder=str(folder)), fold_every=8))
    assert list(folder.iterdir()) == []  # mapped, and without a name: a crash leaves nothing either
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert maps.read_text().count(str(folder)) == 2  # prior and Gram matrix
    assert solver.drift() < 1e-9


def test_a_float32_inverse_is_right_to_float32() -> None:
    exact, short = (fill(make(SolverStorage(inverse=kind), fold_every=8)) for kind in ("float64", "float32"))
    error = float((short.delta - exact.delta).norm() / exact.delta.norm())
    assert 1e-9 < error < 1e-4
    assert torch.equal(short.gram, exact.gram)  # the ground truth is float64
    short.refactorise()
    torch.testing.assert_close(short.delta, exact.delta, rtol=1e-9, atol=1e-9)


def test_a_float32_inverse_is_factorised_anew_when_it_drifts() -> None:
    solver = make(SolverStorage(inverse="float32"), fold_every=4)
    assert solver.drift_bound == 1e-3
    solver.drift_bound = 1e-12  # below what float32 can do
    fill(solver, 8)
    assert solver.refactorisations == 2
    exact = fill(make(SolverStorage(), fold_every=4), 8)
    torch.testing.assert_close(solver.delta, exact.delta, rtol=1e-9, atol=1e-9)


def test_state_of_a_float32_inverse_comes_back() -> None:
    solver = fill(make(SolverStorage(inverse="float32"), fold_every=8))
    again = make(SolverStorage(inverse="float32"), fold_every=8)
    again.load_state_dict(solver.state_dict())
    assert torch.equal(fill(again).delta, fill(solver).delta)


@pytest.mark.parametrize(("name", "value"), [("inverse", "float16"), ("offload", "tape")])
def test_unknown_settings_are_refused(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be one of .*'{value}'"):
        SolverStorage(**{name: value})


def test_editors_hand_it_on() -> None:
    storage = SolverStorage(inverse="float32", offload="cpu")
    assert D4S(storage=storage).storage is storage
