"""Least squares whose solution lives on a subspace of the keys, in coordinates of that subspace."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_edit.devices.algebra import without_autocast
from lit_edit.errors import ArgumentError, check_positive
from lit_edit.solvers.functional import check_facts
from lit_edit.solvers.recursive_least_squares import Block, RidgeSolver, RidgeStep
from lit_edit.solvers.storage import SolverStorage


@dataclass(frozen=True)
class SubspaceStep(RidgeStep):
    """A step with its solution in whole coordinates; ``inner`` is the same in those of the subspace."""

    inner: RidgeStep | None = None


class SubspaceSolver:
    r"""What :class:`RidgeSolver` does, with :math:`\Delta = \Delta' U^\top` for a basis :math:`U`.

    With the prior :math:`\lambda I` on the null space of a second moment it is AlphaEdit (arXiv 2410.02355).
    The released system :math:`(P (K K^\top + K_p K_p^\top) + \lambda I) X = P K R^\top` with :math:`P = U U^\top` is
    not symmetric; in these coordinates it is, and smaller.

    Args:
        basis: :math:`U`, ``(d_in, p)``, orthonormal columns.
        weight: :math:`\lambda`.
        d_out: Rows of the update.
        storage: Type and place of the matrices.
        origin: Digits of what the subspace was made of.
    """

    def __init__(
        self,
        basis: Tensor,
        weight: float,
        d_out: int,
        storage: SolverStorage = SolverStorage(),  # noqa: B008 - frozen
        origin: str = "",
    ) -> None:
        if basis.dim() != 2 or basis.shape[1] == 0:
            raise ArgumentError(f"the subspace of the keys is empty: basis {tuple(basis.shape)}; keep more directions")
        check_positive(weight=weight)
        self.basis, self.origin = storage.place(basis), origin
        self.d_in, self.d_out, self.memory = basis.shape[0], d_out, True
        prior = weight * torch.eye(basis.shape[1], dtype=basis.dtype, device=self.basis.device)
        self.inner = RidgeSolver(prior, d_out, storage=storage)
        self.delta = self.inner.delta.new_zeros(d_out, self.d_in)

    @property
    def prior_checksum(self) -> str:
        """Digits that tell priors apart; not those of the basis, for another machine may find another one."""
        return f"{self.basis.shape[1]}-{self.origin}-{self.inner.prior_checksum}"

    def fork(self) -> SubspaceSolver:
        """Return a solver in the same state to try steps on."""
        fork = copy.copy(self)
        fork.inner = self.inner.fork()
        return fork

    def preview(self, keys: Tensor, residuals: Tensor) -> SubspaceStep:
        """Solve with a further block of facts; see :meth:`RidgeSolver.preview`."""
        check_facts(keys, residuals, self.d_in, self.d_out)
        return self._whole(self.inner.preview(self._project(keys), residuals))

    def preview_removal(self, keys: Tensor, residuals: Tensor) -> SubspaceStep:
        """Solve without some facts; see :meth:`RidgeSolver.preview_removal`."""
        check_facts(keys, residuals, self.d_in, self.d_out)
        return self._whole(self.inner.preview_removal(self._project(keys), residuals))

    def preview_exchange(self, old: Sequence[Block], new: Sequence[Block]) -> SubspaceStep:
        """Solve with some blocks in place of others; see :meth:`RidgeSolver.preview_exchange`."""
        parts = [[Block(self._project(block.keys), block.residuals) for block in blocks] for blocks in (old, new)]
        return self._whole(self.inner.preview_exchange(*parts))

    def alone(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return what facts would do if each were alone; see :meth:`RidgeSolver.alone`."""
        projected, scale = self.inner.alone(self._project(keys))
        with without_autocast(self.basis.device):
            return self.basis @ projected, scale

    def clearing(self) -> SubspaceStep:
        """Return the step to a solution of zero; see :meth:`RidgeSolver.clearing`."""
        return self._whole(self.inner.clearing())

    def absorb(self, step: RidgeStep) -> None:
        """Take a previewed block into the state."""
        inner = step.inner if isinstance(step, SubspaceStep) else None
        if inner is None:
            raise TypeError("a subspace solver absorbs its own steps")
        self.inner.absorb(inner)
        self.delta = step.delta if self.inner.delta is inner.delta else self._expand(self.inner.delta)

    def state_dict(self, copy: bool = True) -> dict[str, Tensor | int]:
        """Return the state, the basis with it: another machine may find another one of the same space."""
        inner = {f"inner.{name}": value for name, value in self.inner.state_dict(copy).items()}
        delta, basis = (self.delta.clone(), self.basis.clone()) if copy else (self.delta, self.basis)
        return {"memory": int(self.memory), "delta": delta, "basis": basis, **inner}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        """Restore :meth:`state_dict`, bit for bit; that of another layer or subspace is refused."""
        loaded: dict[str, Tensor] = {}
        for name, own in (("basis", self.basis), ("delta", self.delta)):
            value = state.get(name)
            if not isinstance(value, Tensor) or value.shape != own.shape:
                raise ValueError(f"the checkpoint's {name} does not fit one of {tuple(own.shape)}")
            loaded[name] = value.to(own, copy=True)
        basis = loaded["basis"]
        lost = self.basis.T - (self.basis.T @ basis) @ basis.T
        if not float(lost.norm()) < 1e-3 * self.basis.shape[1] ** 0.5:
            raise ValueError("the checkpoint's subspace is another one: its key statistics were others")
        self.inner.load_state_dict(
            {n.removeprefix("inner."): value for n, value in state.items() if n.startswith("inner.")}
        )
        self.basis, self.delta = basis, loaded["delta"]

    def _project(self, keys: Tensor) -> Tensor:
        with without_autocast(self.basis.device):
            return self.basis.T @ keys.to(self.basis)

    def _expand(self, delta: Tensor) -> Tensor:
        with without_autocast(self.basis.device):
            return delta.to(self.basis) @ self.basis.T

    def _whole(self, step: RidgeStep) -> SubspaceStep:
        if step.change is None:
            change, delta = None, self._expand(step.delta)
        else:
            change = step.change[0], self._expand(step.change[1].T).T.contiguous()
            with without_autocast(self.delta.device):
                delta = torch.addmm(self.delta, change[0], change[1].T)
        return SubspaceStep(delta, step.keys, step.residuals, step.factor, step.sign, step.anew, change, step)
