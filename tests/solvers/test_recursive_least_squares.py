"""What every solver must do. A new solver is one more row of ``CASES``."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lit_edit.errors import ArgumentError
from lit_edit.solvers import fact_sums
from lit_edit.solvers.functional import ridge_gain, ridge_update, solve_spd
from lit_edit.solvers.recursive_least_squares import RidgeSolver

D_OUT, D_IN = 5, 8
EXACT = {"rtol": 0.0, "atol": 0.0}
ROUND_OFF = {"rtol": 1e-10, "atol": 1e-10}  # float64, well-conditioned problems of size 8
NEVER = 10**6  # facts: no test folds as many
ALWAYS = -1.0  # a bound below any drift: factorise anew at every fold

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

    def run(self, facts: Facts, prior: Tensor | None = None, **options: object) -> RidgeSolver:
        prior = make_prior() if prior is None else prior
        solver = self.make(prior, facts[0][1].shape[0] if facts else D_OUT, **options)
        for keys, residuals in facts:
            solver.update(keys, residuals)
        return solver


def ridge(name: str, **defaults: object) -> Case:
    memory = bool(defaults.get("memory", True))
    naive = joint if memory else summed
    return Case(name, lambda *args, **options: RidgeSolver(*args, **{**defaults, **options}), naive, joint=memory)


RIDGE = ridge("ridge")
FORGETFUL = ridge("ridge without memory", memory=False)
CASES = [
    RIDGE,
    FORGETFUL,
    ridge("ridge folded every 2", fold_every=2),
    ridge("ridge without memory folded every 2", memory=False, fold_every=2),
]
JOINT = [case for case in CASES if case.joint]
both_memories = pytest.mark.parametrize("case", [RIDGE, FORGETFUL], ids=lambda case: case.name)
every_solver = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
joint_solvers = pytest.mark.parametrize("case", JOINT, ids=lambda case: case.name)


def saved(solver: RidgeSolver) -> bytes:
    file = io.BytesIO()
    torch.save(solver.state_dict(), file)
    return file.getvalue()


def state_bytes(solver: RidgeSolver) -> int:
    return sum(v.numel() * v.element_size() for v in solver.state_dict().values() if isinstance(v, Tensor))


def overwrite(state: dict[str, Tensor | int]) -> None:
    for value in state.values():
        if isinstance(value, Tensor):
            value.fill_(7.0)


def same_state(one: dict[str, Tensor | int], other: dict[str, Tensor | int]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]
        for name, value in one.items()
    )


def not_positive(matrix: Tensor) -> Tensor:
    raise ArgumentError("not positive definite")


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
        difference = FORGETFUL.run(singles).solve() - FORGETFUL.run([(keys, residuals)]).solve()
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

    @every_solver
    @pytest.mark.parametrize("fold_every", [0, -1])
    def test_folding_by_less_than_one_fact_is_refused(self, case: Case, fold_every: int) -> None:
        with pytest.raises(ValueError, match=f"fold_every must be at least 1, got {fold_every}"):
            case.make(make_prior(), D_OUT, fold_every=fold_every)

    # ---- state

    @both_memories
    @pytest.mark.parametrize("fold_every", [1, 6, 7, NEVER], ids=["all folded", "just folded", "at a fold", "no fold"])
    def test_preview_changes_nothing(self, case: Case, fold_every: int) -> None:
        solver = case.run(make_facts(), fold_every=fold_every)  # 6 facts
        before, solved = deepcopy(solver.state_dict()), solver.solve().clone()
        [(keys, residuals)] = make_facts((2,), seed=9)
        step = solver.preview(keys, residuals)
        solver.preview(2 * keys, -residuals)
        assert same_state(solver.state_dict(), before)
        torch.testing.assert_close(solver.solve(), solved, **EXACT)
        solver.absorb(step)
        torch.testing.assert_close(solver.solve(), step.delta, **EXACT)
        again = case.run([*make_facts(), (keys, residuals)], fold_every=fold_every)
        assert same_state(solver.state_dict(), again.state_dict())

    @both_memories
    @pytest.mark.parametrize("drift_bound", [1e-8, ALWAYS], ids=["recursive", "factorised anew"])
    @pytest.mark.parametrize("cut", range(7))
    def test_state_round_trip_is_bit_identical(self, case: Case, cut: int, drift_bound: float) -> None:
        """Cut anywhere: before, at, between and after the folds, one of which a block straddles."""
        facts = make_facts((1, 2, 1, 3, 1, 1))  # folded after the second and the fourth
        options = {"fold_every": 3, "drift_bound": drift_bound}
        whole = case.run(facts, **options)
        part = case.run(facts[:cut], **options)
        resumed = case.make(make_prior(), D_OUT, **options)
        resumed.load_state_dict(pickle.loads(pickle.dumps(part.state_dict())))  # noqa: S301 - our own bytes
        assert same_state(resumed.state_dict(), part.state_dict())
        for keys, residuals in facts[cut:]:
            resumed.update(keys, residuals)
        assert same_state(resumed.state_dict(), whole.state_dict())

    @both_memories
    @pytest.mark.parametrize("drift_bound", [1e-8, ALWAYS], ids=["recursive", "factorised anew"])
    def test_state_round_trip_of_a_wide_layer_is_bit_identical(self, case: Case, drift_bound: float) -> None:
        """Large enough for the kernels that add up in another order when a matrix lies otherwise in memory."""
        facts, prior = make_facts((1,) * 9, d_in=96, d_out=70), make_prior(d_in=96) + torch.eye(96)
        options = {"fold_every": 4, "drift_bound": drift_bound}
        whole = case.make(prior, 70, **options)
        files = [saved(whole)]
        for keys, residuals in facts:
            whole.update(keys, residuals)
            files.append(saved(whole))
        for cut, file in enumerate(files):
            resumed = case.make(prior, 70, **options)
            resumed.load_state_dict(torch.load(io.BytesIO(file), weights_only=True))
            for keys, residuals in facts[cut:]:
                resumed.update(keys, residuals)
            assert same_state(resumed.state_dict(), whole.state_dict())

    @every_solver
    def test_resuming_with_another_fold_gives_the_same(self, case: Case) -> None:
        facts = make_facts((1,) * 12)
        for before, after in ((NEVER, 3), (4, NEVER), (4, 1)):
            solver = case.make(make_prior(), D_OUT, fold_every=after)
            solver.load_state_dict(case.run(facts[:7], fold_every=before).state_dict())
            for keys, residuals in facts[7:]:
                solver.update(keys, residuals)
            torch.testing.assert_close(solver.solve(), case.naive(facts, make_prior()), **ROUND_OFF)

    @every_solver
    def test_state_is_tensors_and_integers(self, case: Case) -> None:
        state = case.run(make_facts()).state_dict()
        assert all(type(value) in (Tensor, int) for value in state.values())

    @both_memories
    def test_state_grows_by_columns_up_to_the_first_fold(self, case: Case) -> None:
        solver = case.make(make_prior(), D_OUT, fold_every=10)
        sizes = [state_bytes(solver)]
        for keys, residuals in make_facts((1, 1, 3, 2, 2)):
            solver.update(keys, residuals)
            sizes.append(state_bytes(solver))
        assert sizes[0] == 8 * D_OUT * D_IN  # the solution alone
        column = 8 * (D_IN + D_OUT + D_IN + 1)  # keys, residuals, factor, sign
        assert [after - before for before, after in pairwise(sizes)] == [column * n for n in (1, 1, 3, 2, 2)]

    @both_memories
    def test_state_is_bounded_after_the_first_fold(self, case: Case) -> None:
        """Solution and sums, and at most one column less than a fold takes."""
        matrices = 8 * (2 * D_OUT * D_IN + (2 * D_IN * D_IN if case.joint else 0))
        column = 8 * (D_IN + D_OUT + D_IN + 1)  # keys, residuals, factor, sign
        solver = case.make(make_prior(), D_OUT, fold_every=4)
        for count, (keys, residuals) in enumerate(make_facts((1,) * 40), 1):
            solver.update(keys, residuals)
            if count >= 4:
                assert state_bytes(solver) == matrices + column * (count % 4)
        solver.update(*make_facts((50,), seed=9)[0])  # a block is folded whole
        assert state_bytes(solver) == matrices

    @every_solver
    def test_saved_state_is_independent_of_the_solver(self, case: Case) -> None:
        solver = case.run(make_facts())
        state = solver.state_dict()
        kept = deepcopy(state)
        solver.update(*make_facts((2,), seed=9)[0])  # enough for a fold
        assert same_state(state, kept)
        state, kept = solver.state_dict(), deepcopy(solver.state_dict())
        overwrite(state)
        assert same_state(solver.state_dict(), kept)

    @every_solver
    def test_loaded_state_is_not_shared(self, case: Case) -> None:
        """Two solvers restored from one checkpoint go their own ways, and the checkpoint stays what it was."""
        state = case.run(make_facts()).state_dict()
        kept = deepcopy(state)
        one, other = case.make(make_prior(), D_OUT), case.make(make_prior(), D_OUT)
        one.load_state_dict(state)
        other.load_state_dict(state)
        one.update(*make_facts((2,), seed=9)[0])  # enough for a fold
        assert same_state(state, kept)
        assert same_state(other.state_dict(), kept)
        assert not same_state(one.state_dict(), kept)
        overwrite(state)
        assert same_state(other.state_dict(), kept)

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
        solver = case.make(prior, D_OUT, drift_bound=ALWAYS)
        prior.zero_()
        for keys, residuals in facts:
            solver.update(keys, residuals)
            keys.zero_()
            residuals.zero_()
        solver.refactorise()
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
    @pytest.mark.parametrize("name", ["delta", "keys", "residuals", "factor"])
    @pytest.mark.parametrize("value", [torch.zeros(1, 1), torch.zeros(3), 7], ids=["small", "flat", "number"])
    def test_damaged_state_is_refused_whole(self, case: Case, name: str, value: Tensor | int) -> None:
        """A state that fits in part must not be loaded in part."""
        solver = case.run(make_facts())
        before = deepcopy(solver.state_dict())
        damaged = case.run(make_facts(seed=20)).state_dict()
        damaged[name] = value
        with pytest.raises(ValueError, match="does not fit"):
            solver.load_state_dict(damaged)
        assert same_state(solver.state_dict(), before)

    @both_memories
    @pytest.mark.parametrize("fold_every", [2, NEVER], ids=["folded", "not folded"])
    def test_incomplete_state_is_refused_whole(self, case: Case, fold_every: int) -> None:
        complete = case.run(make_facts((1, 1, 1), seed=20), fold_every=fold_every).state_dict()
        names = set(complete) - {"memory"}
        if not case.joint:  # sums of folded facts only: without them the state is one that has not folded yet
            names -= {"cross"}
        loaded_in_part = []
        for name in sorted(names):
            solver = case.run(make_facts(), fold_every=fold_every)
            before = deepcopy(solver.state_dict())
            with suppress(KeyError, ValueError):
                solver.load_state_dict({k: v for k, v in complete.items() if k != name})
            if not same_state(solver.state_dict(), before):
                loaded_in_part.append(name)
        assert loaded_in_part == []


class TestRidge(SolverTester):
    """The shared tests, and what only recursive least squares can do."""

    # ---- folding

    @both_memories
    @pytest.mark.parametrize("fold_every", [1, 2, 3, 64])
    @pytest.mark.parametrize(
        "sizes",
        [(1,) * 10, (2,) * 5, (5, 1, 4, 2), (70,), (40, 40, 3), (63, 1, 1)],
        ids=["singles", "pairs", "uneven", "one block", "wide blocks", "just a fold"],
    )
    def test_folding_changes_nothing(self, case: Case, sizes: tuple[int, ...], fold_every: int) -> None:
        facts, prior = make_facts(sizes), make_prior()
        solver, plain = (case.make(prior, D_OUT, fold_every=n) for n in (fold_every, NEVER))
        for count, (keys, residuals) in enumerate(facts, 1):
            solver.update(keys, residuals)
            plain.update(keys, residuals)
            torch.testing.assert_close(solver.solve(), case.naive(facts[:count], prior), **ROUND_OFF)
            torch.testing.assert_close(solver.inverse, plain.inverse, **ROUND_OFF)
            assert solver.drift() < 1e-12
        assert solver.blocks == len(sizes)

    @both_memories
    @pytest.mark.parametrize("name", ["gram", "cross"])
    def test_folding_does_not_change_the_sums(self, case: Case, name: str) -> None:
        facts = make_facts((1, 3, 2, 1))
        plain = case.run(facts, fold_every=NEVER)
        for fold_every in (1, 2, 3, 7):
            solver = case.run(facts, fold_every=fold_every)
            torch.testing.assert_close(getattr(solver, name), getattr(plain, name), **ROUND_OFF)

    @pytest.mark.parametrize("fold_every", [1, 3, 64])
    def test_inverse_is_that_of_the_sums(self, fold_every: int) -> None:
        facts = make_facts((1,) * 20)
        solver = RIDGE.run(facts, fold_every=fold_every)
        torch.testing.assert_close(solver.gram, sum(k @ k.T for k, _ in facts), **ROUND_OFF)
        torch.testing.assert_close(solver.cross, sum(r @ k.T for k, r in facts), **ROUND_OFF)
        torch.testing.assert_close(solver.inverse, torch.linalg.inv(make_prior() + solver.gram), **ROUND_OFF)
        assert solver.drift() < 1e-12

    @every_solver
    @pytest.mark.parametrize("name", ["gram", "cross", "inverse"])
    def test_matrices_are_for_reading(self, case: Case, name: str) -> None:
        solver = case.run(make_facts())
        with pytest.raises(AttributeError):
            setattr(solver, name, torch.zeros(D_IN, D_IN))

    @settings(max_examples=100, deadline=None, database=None)
    @given(
        count=st.integers(1, 14),
        cuts=st.lists(st.integers(0, 14), max_size=8),
        fold_every=st.integers(1, 9),
        seed=st.integers(0, 1000),
    )
    def test_any_split_gives_the_joint_solution(self, count: int, cuts: list[int], fold_every: int, seed: int) -> None:
        [(keys, residuals)] = make_facts((count,), seed=seed)
        ends = sorted(min(cut, count) for cut in cuts)  # equal ones make an empty block
        blocks = [(keys[:, a:b], residuals[:, a:b]) for a, b in pairwise([0, *ends, count])]
        solver = RIDGE.run(blocks, fold_every=fold_every)
        torch.testing.assert_close(solver.solve(), ridge_update(keys, residuals, make_prior()), **ROUND_OFF)
        torch.testing.assert_close(solver.solve(), joint([(keys, residuals)], make_prior()), **ROUND_OFF)

    def test_without_memory_p_stays_that_of_the_prior(self) -> None:
        """Every block meets the prior alone, whatever columns are kept."""
        fresh = RidgeSolver(make_prior(), D_OUT, memory=False)
        solver = RidgeSolver(make_prior(), D_OUT, memory=False, fold_every=4, drift_bound=ALWAYS)
        for keys, residuals in make_facts((1,) * 10):
            before, expected = solver.solve(), fresh.preview(keys, residuals)
            step = solver.preview(keys, residuals)
            torch.testing.assert_close(step.delta - before, expected.delta, **ROUND_OFF)
            torch.testing.assert_close(step.factor, expected.factor, **EXACT)
            solver.absorb(step)
            torch.testing.assert_close(solver.inverse, fresh.inverse, **EXACT)
            assert solver.drift() < 1e-12
        state = deepcopy(solver.state_dict())
        solver.refactorise()
        assert same_state(solver.state_dict(), state)
        assert solver.refactorisations == 0

    # ---- drift

    def test_drift_triggers_refactorisation(self) -> None:
        facts = make_facts((1,) * 8)
        solver = RIDGE.run(facts[:7], fold_every=8, drift_bound=1e-8)
        clean = solver.solve().clone()
        solver._inverse += 1e-4 * torch.eye(D_IN)
        assert solver.drift() > 1e-6
        solver.update(*facts[7])
        assert solver.refactorisations == 1
        assert solver.drift() < 1e-12
        torch.testing.assert_close(solver.solve(), joint(facts, make_prior()), **ROUND_OFF)
        assert not torch.allclose(solver.solve(), clean)

    def test_drift_beyond_numbers_triggers_refactorisation(self) -> None:
        facts = make_facts((1,) * 4)
        solver = RIDGE.run(facts[:3], fold_every=4)
        step = solver.preview(*facts[3])
        solver._inverse[0, 0] = torch.nan
        solver.absorb(step)
        assert solver.refactorisations == 1
        torch.testing.assert_close(solver.solve(), joint(facts, make_prior()), **ROUND_OFF)

    def test_no_refactorisation_without_drift(self) -> None:
        assert RIDGE.run(make_facts((1,) * 20), fold_every=1).refactorisations == 0

    @pytest.mark.parametrize(("sizes", "folds"), [((1,) * 10, 3), ((2,) * 4, 2), ((7, 1, 1), 1), ((1, 1), 0)])
    def test_drift_is_measured_at_each_fold(self, sizes: tuple[int, ...], folds: int) -> None:
        solver = RIDGE.run(make_facts(sizes), fold_every=3, drift_bound=ALWAYS)
        assert solver.refactorisations == folds
        torch.testing.assert_close(solver.solve(), joint(make_facts(sizes), make_prior()), **ROUND_OFF)

    @pytest.mark.parametrize("folded", [0, 3, 5])
    def test_refactorising_on_request_takes_the_columns_in(self, folded: int) -> None:
        facts = make_facts((1,) * 8)
        solver = RIDGE.run(facts[:5], fold_every=folded or NEVER)
        solver._inverse += 1e-4 * torch.eye(D_IN)
        solver.refactorise()
        assert solver.drift() < 1e-12
        torch.testing.assert_close(solver.solve(), joint(facts[:5], make_prior()), **ROUND_OFF)
        torch.testing.assert_close(solver.gram, sum(k @ k.T for k, _ in facts[:5]), **ROUND_OFF)
        assert solver.state_dict()["keys"].shape == (D_IN, 0)
        for keys, residuals in facts[5:]:
            solver.update(keys, residuals)
        torch.testing.assert_close(solver.solve(), joint(facts, make_prior()), **ROUND_OFF)

    def test_refactorisation_that_fails_leaves_a_warning_and_the_solution(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Absorbing must not fail: the facts are committed. The stream goes on, and so do the attempts."""
        facts = make_facts((1,) * 9)
        solver = RIDGE.run(facts[:1], fold_every=3, drift_bound=ALWAYS)
        with monkeypatch.context() as patch:
            patch.setattr(fact_sums, "inverse_spd", not_positive)
            for count, (keys, residuals) in enumerate(facts[1:7], 2):
                solver.update(keys, residuals)
                assert len(caplog.records) == count // 3
                torch.testing.assert_close(solver.solve(), joint(facts[:count], make_prior()), **ROUND_OFF)
            assert {record.levelname for record in caplog.records} == {"WARNING"}
            assert "cannot be factorised anew (drift " in caplog.text
            assert solver.refactorisations == 0
            torch.testing.assert_close(solver.inverse, torch.linalg.inv(make_prior() + solver.gram), **ROUND_OFF)

            state = deepcopy(solver.state_dict())
            with pytest.raises(ArgumentError):  # asked for, it says so, and changes nothing
                solver.refactorise()
            assert same_state(solver.state_dict(), state)
        for keys, residuals in facts[7:]:
            solver.update(keys, residuals)
        assert solver.refactorisations == 1
        assert len(caplog.records) == 2
        torch.testing.assert_close(solver.solve(), joint(facts, make_prior()), **ROUND_OFF)

    @pytest.mark.parametrize(
        ("base", "noise", "prior", "refactorised"),
        [(0.0, 1.0, 1.0, False), (30.0, 0.1, 0.01, True)],
        ids=["different keys", "similar keys"],
    )
    def test_long_streams_drift_below_the_bound(
        self, base: float, noise: float, prior: float, refactorised: bool
    ) -> None:
        solver = RidgeSolver(make_prior(prior), D_OUT)
        direction, keys, residuals = draw(D_IN, 1, seed=0), draw(D_IN, 3000, seed=1), draw(D_OUT, 3000, seed=2)
        for index in range(3000):
            key = base * direction + noise * keys[:, index : index + 1]
            solver.update(key, residuals[:, index : index + 1])
            if (index + 1) % solver.fold_every == 0:
                assert solver.drift() <= solver.drift_bound
        assert (solver.refactorisations > 0) == refactorised
        expected = ridge_update(base * direction + noise * keys, residuals, make_prior(prior))
        assert (solver.solve() - expected).norm() < 1e-6 * expected.norm()  # drift_bound times some

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
        found, factor = ridge_gain(projected, keys)
        torch.testing.assert_close(found, gain, **ROUND_OFF)
        torch.testing.assert_close(residuals @ gain.T, ridge_update(keys, residuals, prior), **ROUND_OFF)
        smaller = torch.linalg.inv(prior) - factor @ factor.T
        torch.testing.assert_close(smaller, torch.linalg.inv(prior + keys @ keys.T), **ROUND_OFF)
        torch.testing.assert_close(factor @ factor.T, gain @ projected.T, **ROUND_OFF)

    def test_ridge_gain_refuses_what_is_not_positive_definite(self) -> None:
        with pytest.raises(ValueError, match=r"model\.statistics\.tokens"):
            ridge_gain(-2 * torch.eye(2), torch.eye(2))

    def test_solve_spd_refuses_what_is_not_positive_definite(self) -> None:
        with pytest.raises(ValueError, match=r"model\.statistics\.tokens"):
            solve_spd(torch.zeros(2, 2), torch.ones(2, 1))
