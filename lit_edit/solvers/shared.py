"""A solver that several ranks share: it lives on the leader, the others follow the solution."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lit_edit.devices.algebra import algebra_device, algebra_dtype
from lit_edit.devices.ranks import Payload, Ranks
from lit_edit.errors import ArgumentError
from lit_edit.solvers.functional import FactsError
from lit_edit.solvers.recursive_least_squares import Block, RidgeSolver, RidgeStep
from lit_edit.solvers.subspace import SubspaceSolver

OwnSolver = RidgeSolver | SubspaceSolver
"""A solver of one process."""

_TOLD = (ArgumentError, FactsError)


class SharedSolver:
    r"""What :class:`RidgeSolver` is to one process, for many.

    The matrices of size ``(d_in, d_in)`` exist once, on the leader, which makes the solver and solves. The others carry
    the solution ``(d_out, d_in)``, on ``device``: a block of :math:`b` facts changes it by :math:`M G^\top` with the
    gain :math:`G = P K S^{-1}`, so ``b (d_in + d_out)`` numbers are told instead of ``d_in d_out``. What goes wrong on
    the leader is raised on all ranks.
    """

    def __init__(
        self, ranks: Ranks, make: Callable[[], OwnSolver], shape: tuple[int, int], memory: bool, device: torch.device
    ) -> None:
        self.ranks, self.memory = ranks, memory
        self.d_out, self.d_in = shape
        self._own: OwnSolver | None = None
        place, rows = algebra_device(device), 0 if ranks.leads else self.d_out
        self._delta = torch.zeros(rows, self.d_in, dtype=algebra_dtype(place), device=place)

        def work() -> Payload:
            self._own = make()
            return self._own.prior_checksum, {}

        self.prior_checksum: str = ranks.lead(work, _TOLD)[0]

    @property
    def delta(self) -> Tensor:
        """``(d_out, d_in)``, the running solution."""
        return self._delta if self._own is None else self._own.delta

    def fork(self) -> SharedSolver:
        """Return a solver in the same state to try steps on."""
        fork = copy.copy(self)
        fork._own = None if self._own is None else self._own.fork()
        return fork

    def preview(self, keys: Tensor, residuals: Tensor) -> RidgeStep:
        """Solve with a further block of facts; see :meth:`RidgeSolver.preview`."""
        return self._step(lambda own: own.preview(keys, residuals))

    def preview_removal(self, keys: Tensor, residuals: Tensor) -> RidgeStep:
        """Solve without some facts; see :meth:`RidgeSolver.preview_removal`."""
        return self._step(lambda own: own.preview_removal(keys, residuals))

    def preview_exchange(self, old: Sequence[Block], new: Sequence[Block]) -> RidgeStep:
        """Solve with some blocks in place of others; see :meth:`RidgeSolver.preview_exchange`."""
        return self._step(lambda own: own.preview_exchange(old, new))

    def clearing(self) -> RidgeStep:
        """Return the step to a solution of zero; see :meth:`RidgeSolver.clearing`."""
        return self._step(lambda own: own.clearing())

    def alone(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return what facts would do if each were alone; see :meth:`RidgeSolver.alone`."""

        def work() -> Payload:
            projected, scale = self._leader.alone(keys)
            return None, {"projected": projected, "scale": scale}

        told = self.ranks.lead(work, _TOLD)[1]
        return told["projected"].to(self.delta.device), told["scale"].to(self.delta.device)

    def absorb(self, step: RidgeStep) -> None:
        """Take a previewed block into the state, on all ranks; a fold may compute the solution anew."""

        def work() -> Payload:
            own = self._leader
            own.absorb(step)
            return None, {} if own.delta is step.delta else {"delta": own.delta}

        told = self.ranks.lead(work)[1]
        if self._own is None:
            self._delta = told["delta"].to(self._delta) if told else step.delta

    def state_dict(self, copy: bool = True) -> dict[str, Tensor | int]:
        """Return the state: the leader's is that of :class:`RidgeSolver`, the others' the solution alone."""
        if self._own is not None:
            return self._own.state_dict(copy)
        return {"memory": int(self.memory), "delta": self._delta.clone() if copy else self._delta}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        """Restore the leader's :meth:`state_dict`, on all ranks; see :meth:`RidgeSolver.load_state_dict`."""

        def work() -> Payload:
            self._leader.load_state_dict(state)
            return None, {}

        self.ranks.lead(work, (ValueError, *_TOLD))
        if self._own is None:
            delta = state["delta"]
            assert isinstance(delta, Tensor)  # noqa: S101 - the leader has looked at the same state
            self._delta = delta.to(self._delta, copy=True)

    @property
    def _leader(self) -> OwnSolver:
        assert self._own is not None  # noqa: S101 - asked for by what the leader runs
        return self._own

    def _step(self, solve: Callable[[OwnSolver], RidgeStep]) -> RidgeStep:
        made: list[RidgeStep] = []

        def work() -> Payload:
            step = solve(self._leader)
            made.append(step)
            if step.change is None:
                return None, {"delta": step.delta}
            return None, {"left": step.change[0], "right": step.change[1]}

        told = self.ranks.lead(work, _TOLD)[1]
        if made:
            return made[0]
        told = {name: value.to(self._delta) for name, value in told.items()}
        delta = told["delta"] if "delta" in told else torch.addmm(self._delta, told["left"], told["right"].T)
        empty = self._delta.new_empty(0, 0)
        return RidgeStep(delta, empty, empty, empty)


Solver = OwnSolver | SharedSolver
