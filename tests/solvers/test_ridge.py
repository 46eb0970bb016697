"""What every solver must do. A new solver is one more row of ``CASES``."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from lit_edit.solvers.functional import ridge_gain, ridge_update, solve_spd
from lit_edit.solvers.ridge import RidgeSolver

D_OUT, D_IN = 5, 8
EXACT = {"rtol": 0.0, "atol": 0.0}
ROUND_OFF = {"rtol": 1e-10, "atol": 1e-10}  # float64, well-conditioned problems of size 8

Facts = list[tuple[Tensor, Tensor]]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make_prior(weight: float = 1.0, d_in: int = D_IN) -> Tensor:
    """lambda * C of 40 random keys."""
    keys = draw(d_in, 40, seed=99)
    return weight * keys @ keys.T / 40


def make_facts(sizes: tuple[int, ...] = (1, 3, 2), seed: int = 0, d_in: int = D_IN, d_out: int = D_OUT) -> Facts:
    return [(draw(d_in, n, seed=seed + i), draw(d_out, n, seed=seed + 50 + i)) for i, n in enumerate(sizes)]


def joint(facts: Facts, prior: Tensor) -> Tensor:
    """The joint least-squares delta of all facts, as one would write it down."""
    keys, residuals = (torch.cat(parts, 1) for parts in zip(*facts, strict=True))
    return residuals @ keys.T @ torch.linalg.inv(prior + keys @ keys.T)


def summed(facts: Facts, prior: Tensor) -> Tensor:
    """Sequential MEMIT: every block against the prior alone, added up."""
    return sum((joint([block], prior) for block in facts), torch.zeros(()))


@dataclass(frozen=True)
class Case:
    """One solver with its naive formula and what it promises."""

    name: str
    make: Callable[..., RidgeSolver]
    naive: Callable[[Facts, Tensor], Tensor]
    joint: bool  # all blocks are one problem: splitting them does not matter

    def run(self, facts: Facts, prior: Tensor | None = None, **settings: object) -> RidgeSolver:
        prior = make_prior() if prior is None else prior
        solver = self.make(prior, facts[0][1].shape[0] if facts else D_OUT, **settings)
        for keys, residuals in facts:
            solver.update(keys, residuals)
        return solver


CASES = [
    Case("ridge", RidgeSolver, joint, joint=True),
    Case("ridge without memory", lambda *a, **k: RidgeSolver(*a, memory=False, **k), summed, joint=False),
]
JOINT = [case for case in CASES if case.joint]
every_solver = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
joint_solvers = pytest.mark.parametrize("case", JOINT, ids=lambda case: case.name)


def same_state(one: dict[str, Tensor | int], other: dict[str, Tensor | int]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]
        for name, value in one.items()
    )


class SolverTester:
    """The shared tests."""

    # ---- the formula

    @every_solver
    @pytest.mark.parametrize("sizes", [(1,), (4,), (1, 1, 1), (3, 1, 5), (12,), (20, 1)])
    def test_equals_the_naive_formula(self, case: Case, sizes: tuple[int, ...]) -> None:
        facts = make_facts(sizes)
        torch.testing.assert_close(case.run(facts).solve(), case.naive(facts, make_prior()), **ROUND_OFF)

    @every_solver
    @pytest.mark.parametrize(("d_in", "d_out"), [(6, 6), (4, 9), (1, 1)])
    def test_shapes(self, case: Case, d_in: int, d_out: int) -> None:
        facts, prior = make_facts(d_in=d_in, d_out=d_out), make_prior(d_in=d_in)
        solved = case.run(facts, prior).solve()
        assert solved.shape == (d_out, d_in)
        torch.testing.assert_close(solved, case.naive(facts, prior), **ROUND_OFF)

    @every_solver
    def test_order_of_blocks_does_not_matter(self, case: Case) -> None:
        facts = make_facts((1, 3, 2, 1))
        for order in ((3, 2, 1, 0), (2, 0, 3, 1)):
            shuffled = [facts[i] for i in order]
            torch.testing.assert_close(case.run(shuffled).solve(), case.run(facts).solve(), **ROUND_OFF)

    @joint_solvers
    def test_singles_equal_one_batch(self, case: Case) -> None:
        [(keys, residuals)] = make_facts((7,))
        singles = [(keys[:, i : i + 1], residuals[:, i : i + 1]) for i in range(7)]
        torch.testing.assert_close(case.run(singles).solve(), case.run([(keys, residuals)]).solve(), **ROUND_OFF)

    def test_without_memory_singles_differ_from_one_batch(self) -> None:
        """Else the test above would prove nothing about memory."""
        [(keys, residuals)] = make_facts((7,))
        singles = [(keys[:, i : i + 1], residuals[:, i : i + 1]) for i in range(7)]
        forgetful = CASES[1]
        difference = forgetful.run(singles).solve() - forgetful.run([(keys, residuals)]).solve()
        assert difference.norm() > 0.1

    @every_solver
    def test_zero_residual_gives_zero_delta(self, case: Case) -> None:
        facts = [(keys, torch.zeros_like(residuals)) for keys, residuals in make_facts()]
        torch.testing.assert_close(case.run(facts).solve(), torch.zeros(D_OUT, D_IN, dtype=torch.float64), **EXACT)

    @joint_solvers
    def test_normal_equations_hold(self, case: Case) -> None:
        facts = make_facts((1,) * 30)
        solver = case.run(facts)
        left = make_prior() + sum(k @ k.T for k, _ in facts)
        right = sum(r @ k.T for k, r in facts)
        assert (solver.solve() @ left - right).norm() <= 1e-9 * right.norm()

    @joint_solvers
    def test_solution_is_the_minimum(self, case: Case) -> None:
        """sum |D k - r|^2 + tr(D prior D^T) grows in every direction."""
        facts, prior = make_facts(), make_prior()
        keys, residuals = (torch.cat(parts, 1) for parts in zip(*facts, strict=True))

        def objective(delta: Tensor) -> Tensor:
            return (delta @ keys - residuals).square().sum() + (delta @ prior * delta).sum()

        best = case.run(facts).solve()
        for seed in range(5):
            assert objective(best + 1e-3 * draw(D_OUT, D_IN, seed=seed)) > objective(best)

    @every_solver
    def test_strong_prior_gives_nothing(self, case: Case) -> None:
        facts = make_facts()
        assert case.run(facts, make_prior(1e12)).solve().norm() < 1e-9 * sum(r.norm() for _, r in facts)

    @joint_solvers
    def test_weak_prior_fits_independent_keys(self, case: Case) -> None:
        facts = make_facts((1, 3, 2))  # 6 keys of 8 dimensions
        delta = case.run(facts, make_prior(1e-9)).solve()
        for keys, residuals in facts:
            torch.testing.assert_close(delta @ keys, residuals, rtol=0, atol=1e-6)  # lambda times the condition

    @joint_solvers
    def test_repeated_fact_saturates(self, case: Case) -> None:
        """D k = t s / (1 + t s) r with s = k^T prior^-1 k (methods.md, section 1)."""
        [(keys, residuals)] = make_facts((1,))
        size = (keys.T @ torch.linalg.inv(make_prior()) @ keys).item()
        for times in (1, 2, 10, 100):
            delta = case.run([(keys, residuals)] * times).solve()
            torch.testing.assert_close(delta @ keys, times * size / (1 + times * size) * residuals, **ROUND_OFF)

    @joint_solvers
    def test_conflicting_residuals_are_averaged(self, case: Case) -> None:
        [(keys, first)] = make_facts((1,))
        second = draw(D_OUT, 1, seed=7)
        delta = case.run([(keys, first), (keys, second)], make_prior(1e-6)).solve()
        torch.testing.assert_close(delta @ keys, (first + second) / 2, rtol=0, atol=1e-5)  # lambda = 1e-6

    # ---- awkward facts

    @every_solver
    def test_no_columns_change_nothing(self, case: Case) -> None:
        empty = (torch.zeros(D_IN, 0), torch.zeros(D_OUT, 0))
        with_empty = case.run([empty, *make_facts(), empty])
        torch.testing.assert_close(with_empty.solve(), case.run(make_facts()).solve(), **EXACT)
        assert case.run([empty]).solve().count_nonzero() == 0

    @every_solver
    @pytest.mark.parametrize("kind", ["duplicates", "rank one", "zero keys", "more than d_in"])
    def test_dependent_keys(self, case: Case, kind: str) -> None:
        residuals = draw(D_OUT, 12, seed=3)
        keys = {
            "duplicates": draw(D_IN, 3, seed=1).repeat(1, 4),
            "rank one": draw(D_IN, 1, seed=1) * draw(1, 12, seed=2),
            "zero keys": torch.zeros(D_IN, 12, dtype=torch.float64),
            "more than d_in": draw(D_IN, 12, seed=1),
        }[kind]
        facts = [(keys[:, :5], residuals[:, :5]), (keys[:, 5:], residuals[:, 5:])]
        solver = case.run(facts)
        assert torch.isfinite(solver.solve()).all()
        torch.testing.assert_close(solver.solve(), case.naive(facts, make_prior()), **ROUND_OFF)

    @every_solver
    def test_large_keys(self, case: Case) -> None:
        facts = [(1e4 * keys, residuals) for keys, residuals in make_facts()]
        close = {"rtol": 1e-5, "atol": 1e-11}  # the condition of prior + K K^T is 1e8
        torch.testing.assert_close(case.run(facts).solve(), case.naive(facts, make_prior()), **close)

    @every_solver
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_facts_of_any_type_are_solved_in_float64(self, case: Case, dtype: torch.dtype) -> None:
        facts = [(keys.to(dtype), residuals.to(dtype)) for keys, residuals in make_facts()]
        exact = [(keys.double(), residuals.double()) for keys, residuals in facts]
        solver = case.run(facts, make_prior().float())
        assert solver.solve().dtype == torch.float64
        torch.testing.assert_close(solver.solve(), case.naive(exact, make_prior().float().double()), **ROUND_OFF)

    # ---- refusals

    @every_solver
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("where", ["keys", "residuals"])
    def test_bad_values_are_refused_and_change_nothing(self, case: Case, where: str, value: float) -> None:
        solver = case.run(make_facts())
        before = deepcopy(solver.state_dict())
        [(keys, residuals)] = make_facts((2,), seed=9)
        (keys if where == "keys" else residuals)[0, 1] = value
        with pytest.raises(ValueError, match=f"^{where} hold NaN or infinite"):
            solver.update(keys, residuals)
        assert same_state(solver.state_dict(), before)

    @every_solver
    @pytest.mark.parametrize(
        ("keys", "residuals", "message"),
        [
            ((D_IN + 1, 2), (D_OUT, 2), r"keys must be \(d_in, n\) = \(8, n\), got \(9, 2\)"),
            ((D_IN,), (D_OUT, 1), "keys must be"),
            ((D_IN, 2), (D_OUT + 1, 2), r"residuals must be \(d_out, n\) = \(5, n\), got \(6, 2\)"),
            ((D_IN, 2), (D_OUT, 3), "keys hold 2 facts and residuals 3"),
        ],
    )
    def test_wrong_shapes_are_refused(
        self, case: Case, keys: tuple[int, ...], residuals: tuple[int, ...], message: str
    ) -> None:
        solver = case.run(make_facts())
        before = deepcopy(solver.state_dict())
        with pytest.raises(ValueError, match=message):
            solver.update(torch.ones(keys), torch.ones(residuals))
        assert same_state(solver.state_dict(), before)

    @every_solver
    @pytest.mark.parametrize(
        ("prior", "message"),
        [
            (torch.ones(2, 3), "prior must be square"),
            (torch.ones(3), "prior must be square"),
            (torch.diag(torch.tensor([1.0, float("nan")])), "NaN or infinite"),
            (torch.diag(torch.tensor([1.0, 0.0])), "not positive definite"),
            (-torch.eye(2), "not positive definite"),
        ],
    )
    def test_bad_priors_are_refused(self, case: Case, prior: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            case.make(prior, D_OUT)

    # ---- state

    @every_solver
    def test_preview_changes_nothing(self, case: Case) -> None:
        solver = case.run(make_facts())
        before = deepcopy(solver.state_dict())
        [(keys, residuals)] = make_facts((2,), seed=9)
        step = solver.preview(keys, residuals)
        assert same_state(solver.state_dict(), before)
        solver.absorb(step)
        torch.testing.assert_close(solver.solve(), step.delta, **EXACT)
        torch.testing.assert_close(solver.solve(), case.run([*make_facts(), (keys, residuals)]).solve(), **EXACT)

    @every_solver
    @pytest.mark.parametrize("cut", range(7))
    def test_state_round_trip_is_bit_identical(self, case: Case, cut: int) -> None:
        """Cut anywhere, also around a refactorisation, which the counter in the state decides."""
        facts = make_facts((1, 2, 1, 3, 1, 1))
        settings = {"check_every": 2, "drift_bound": 0.0}  # factorise anew at every check
        whole = case.run(facts, **settings)
        part = case.run(facts[:cut], **settings)
        resumed = case.make(make_prior(), D_OUT, **settings)
        resumed.load_state_dict(pickle.loads(pickle.dumps(part.state_dict())))  # noqa: S301 - our own bytes
        for keys, residuals in facts[cut:]:
            resumed.update(keys, residuals)
        assert same_state(resumed.state_dict(), whole.state_dict())

    @every_solver
    def test_state_is_tensors_and_integers(self, case: Case) -> None:
        state = case.run(make_facts()).state_dict()
        assert all(type(value) in (Tensor, int) for value in state.values())

    @every_solver
    def test_state_does_not_grow(self, case: Case) -> None:
        def size(count: int) -> int:
            return sum(
                v.numel() for v in case.run(make_facts((1,) * count)).state_dict().values() if isinstance(v, Tensor)
            )

        assert size(1) == size(40)

    @every_solver
    def test_saved_state_is_independent_of_the_solver(self, case: Case) -> None:
        solver = case.run(make_facts())
        saved = solver.state_dict()
        kept = deepcopy(saved)
        solver.update(*make_facts((1,), seed=9)[0])
        assert same_state(saved, kept)

    @every_solver
    def test_loaded_state_is_not_shared(self, case: Case) -> None:
        """Two solvers restored from one checkpoint go their own ways, and the checkpoint stays what it was."""
        saved = case.run(make_facts()).state_dict()
        kept = deepcopy(saved)
        one, other = case.make(make_prior(), D_OUT), case.make(make_prior(), D_OUT)
        one.load_state_dict(saved)
        other.load_state_dict(saved)
        one.update(*make_facts((1,), seed=9)[0])
        assert same_state(saved, kept)
        assert same_state(other.state_dict(), kept)
        assert not same_state(one.state_dict(), kept)

    @every_solver
    def test_two_instances_are_independent(self, case: Case) -> None:
        prior, keys = make_prior(), draw(D_IN, 1, seed=1)
        first, second = case.make(prior, D_OUT), case.make(prior, D_OUT)
        copied = deepcopy(first)
        first.update(keys, draw(D_OUT, 1, seed=2))
        assert second.solve().count_nonzero() == 0
        assert copied.solve().count_nonzero() == 0
        torch.testing.assert_close(prior, make_prior(), **EXACT)
        torch.testing.assert_close(keys, draw(D_IN, 1, seed=1), **EXACT)

    @every_solver
    def test_facts_and_prior_may_be_overwritten_afterwards(self, case: Case) -> None:
        """Callers reuse buffers; what the solver took in must not follow."""
        prior, facts = make_prior(), make_facts((1, 2))
        solver = case.make(prior, D_OUT, check_every=1, drift_bound=0.0)
        prior.zero_()
        for keys, residuals in facts:
            solver.update(keys, residuals)
            keys.zero_()
            residuals.zero_()
        torch.testing.assert_close(solver.solve(), case.naive(make_facts((1, 2)), make_prior()), **ROUND_OFF)

    @every_solver
    def test_statistics_survive_the_cast_of_a_module(self, case: Case) -> None:
        class Holder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(2, 2)
                self.solver = case.run(make_facts())

        holder = Holder()
        before = deepcopy(holder.solver.state_dict())
        holder.to(torch.bfloat16).half()
        assert holder.layer.weight.dtype == torch.float16
        assert same_state(holder.solver.state_dict(), before)
        with torch.autocast("cpu", torch.bfloat16):
            holder.solver.update(*make_facts((1,), seed=9)[0])
        facts = [*make_facts(), *make_facts((1,), seed=9)]
        torch.testing.assert_close(holder.solver.solve(), case.naive(facts, make_prior()), **ROUND_OFF)
        assert not any("solver" in name for name in holder.state_dict())

    @every_solver
    def test_state_of_another_layer_is_refused(self, case: Case) -> None:
        solver = case.run(make_facts())
        before = deepcopy(solver.state_dict())
        other = case.run(make_facts(d_in=D_IN + 1), make_prior(d_in=D_IN + 1)).state_dict()
        with pytest.raises(ValueError, match="does not fit a layer of"):
            solver.load_state_dict(other)
        assert same_state(solver.state_dict(), before)

    @pytest.mark.parametrize("memory", [True, False])
    def test_state_of_the_other_memory_is_refused(self, memory: bool) -> None:
        other = RidgeSolver(make_prior(), D_OUT, memory=not memory).state_dict()
        with pytest.raises(ValueError, match="another memory setting"):
            RidgeSolver(make_prior(), D_OUT, memory=memory).load_state_dict(other)

    @every_solver
    def test_damaged_state_is_refused_whole(self, case: Case) -> None:
        """A state that fits in part must not be loaded in part."""
        solver = case.run(make_facts())
        before = deepcopy(solver.state_dict())
        damaged = case.run(make_facts(seed=20)).state_dict()
        damaged["delta"] = torch.zeros(1, 1)
        with pytest.raises(ValueError, match="delta does not fit"):
            solver.load_state_dict(damaged)
        assert same_state(solver.state_dict(), before)


class TestRidge(SolverTester):
    """The shared tests, and what only recursive least squares can do."""

    def test_inverse_is_that_of_the_sums(self) -> None:
        solver = JOINT[0].run(make_facts((1,) * 20))
        expected = torch.linalg.inv(make_prior() + solver.gram)
        torch.testing.assert_close(solver.inverse, expected, **ROUND_OFF)
        torch.testing.assert_close(solver.gram, sum(k @ k.T for k, _ in make_facts((1,) * 20)), **ROUND_OFF)
        assert solver.drift() < 1e-12

    def test_drift_triggers_refactorisation(self) -> None:
        facts = make_facts((1,) * 8)
        solver = RidgeSolver(make_prior(), D_OUT, check_every=8, drift_bound=1e-8)
        for keys, residuals in facts[:7]:
            solver.update(keys, residuals)
        clean = solver.solve().clone()
        solver.inverse += 1e-4 * torch.eye(D_IN)
        assert solver.drift() > 1e-6
        solver.update(*facts[7])
        assert solver.refactorisations == 1
        assert solver.drift() < 1e-12
        torch.testing.assert_close(solver.solve(), joint(facts, make_prior()), **ROUND_OFF)
        assert not torch.allclose(solver.solve(), clean)

    def test_no_refactorisation_without_drift(self) -> None:
        solver = RidgeSolver(make_prior(), D_OUT, check_every=1)
        for keys, residuals in make_facts((1,) * 20):
            solver.update(keys, residuals)
        assert solver.refactorisations == 0

    def test_drift_is_measured_every_so_many_blocks(self) -> None:
        solver = RidgeSolver(make_prior(), D_OUT, check_every=3, drift_bound=0.0)
        for keys, residuals in make_facts((1,) * 10):
            solver.update(keys, residuals)
        assert solver.refactorisations == 3

    def test_long_streams_of_similar_keys_stay_exact(self) -> None:
        """Ill-conditioned on purpose: two thousand keys near one direction, a weak prior."""
        base, facts = draw(D_IN, 1, seed=0), []
        for index in range(2000):
            facts.append((100 * base + 0.01 * draw(D_IN, 1, seed=index), draw(D_OUT, 1, seed=index + 5000)))
        solver = RidgeSolver(make_prior(1e-2), D_OUT)
        for keys, residuals in facts:
            solver.update(keys, residuals)
        expected = ridge_update(*(torch.cat(parts, 1) for parts in zip(*facts, strict=True)), make_prior(1e-2))
        error = (solver.solve() - expected).norm() / expected.norm()
        assert error < 1e-5  # the condition is about 1e9; without refactorisation P would be off by far more

    def test_functional_twins(self) -> None:
        [(keys, residuals)] = make_facts((4,))
        prior = make_prior()
        torch.testing.assert_close(ridge_update(keys, residuals, prior), joint([(keys, residuals)], prior), **ROUND_OFF)
        projected = torch.linalg.inv(prior) @ keys
        gain = projected @ torch.linalg.inv(torch.eye(4, dtype=torch.float64) + keys.T @ projected)
        torch.testing.assert_close(ridge_gain(projected, keys), gain, **ROUND_OFF)
        torch.testing.assert_close(residuals @ gain.T, ridge_update(keys, residuals, prior), **ROUND_OFF)

    def test_solve_spd_refuses_what_is_not_positive_definite(self) -> None:
        with pytest.raises(ValueError, match=r"model\.statistics\.tokens"):
            solve_spd(torch.zeros(2, 2), torch.ones(2, 1))
