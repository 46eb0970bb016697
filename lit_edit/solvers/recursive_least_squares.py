"""Recursive least squares: the running joint solution of all facts of one layer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_edit.solvers.fact_sums import FactSums, exact
from lit_edit.solvers.functional import (
    check_facts,
    constrained_update,
    inverse_spd,
    removal_gain,
    ridge_gain,
    ridge_update,
)
from lit_edit.solvers.storage import SolverStorage


@dataclass(frozen=True)
class RidgeStep:
    """A solved but not yet absorbed block of facts, ``(d_in, b)`` and ``(d_out, b)``; absorbing it cannot fail.

    Attributes:
        delta: ``(d_out, d_in)``, the layer's whole update after this block.
        factor: ``(d_in, b)``, what ``P`` loses: the next one is ``P - sign factor factor^T``.
        sign: 1 for facts that are added, -1 for facts that are taken out.
        anew: ``P``, where it had to be factorised anew instead of being updated.
        change: ``(d_out, b)`` and ``(d_in, b)`` whose product the solution has changed by, where it is one.
    """

    delta: Tensor
    keys: Tensor
    residuals: Tensor
    factor: Tensor
    sign: int = 1
    anew: Tensor | None = None
    change: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Block:
    """Facts that were solved together: keys ``(d_in, b)`` and residuals ``(d_out, b)``."""

    keys: Tensor
    residuals: Tensor


class RidgeSolver(FactSums):
    r"""Least squares over a growing set of facts with a fixed prior, in ``O(d_in^2 + d_in d_out)`` per fact.

    After facts :math:`(k_i, r_i)` the solution is :math:`\Delta = A (\Lambda + G)^{-1}` with :math:`G = \sum k k^\top`
    and :math:`A = \sum r k^\top` (D4S, arXiv 2410.23843). :math:`P = (\Lambda + G)^{-1}` and :math:`\Delta` are carried
    along by the Woodbury identity; the state does not grow with the number of facts.

    A fact is taken out again by down-dating (:meth:`preview_removal`): a column with the sign turned round. Keys and
    residuals are not kept beyond a fold, so whoever wants to take facts out must bring them.

    The statistics are plain float64 tensors, no buffers: ``module.to(bfloat16)``, autocast and DDP do not reach them.

    Args:
        prior: :math:`\Lambda = \lambda C`, ``(d_in, d_in)``, symmetric positive definite.
        d_out: Rows of the update.
        memory: With ``False`` each block is solved against the prior alone and added up: sequential MEMIT, which
            forgets its earlier keys.
        fold_every: Facts kept as columns.
        drift_bound: Factorise anew when ``|P (prior + G) x - x| / |x|`` exceeds this for a probe ``x``; measured at
            each fold. By default 1e-8, or 1e-3 with ``P`` in float32.
        storage: Type and place of the matrices.
        slack: How exactly a block is to hold: 1 in least squares, 0 exactly (:func:`constrained_update`). Other values
            than 1 are for solvers without memory.
        slack_alone: The same for a block of one fact; by default as the others.

    Raises:
        ValueError: If the prior is not square, not finite or not positive definite, or an argument is out of range.

    Example:
        >>> solver = RidgeSolver(torch.eye(2), d_out=1)
        >>> solver.update(torch.tensor([[1.0], [0.0]]), torch.tensor([[2.0]]))
        >>> solver.solve().round(decimals=6)
        tensor([[1., 0.]], dtype=torch.float64)
    """

    def __init__(
        self,
        prior: Tensor,
        d_out: int,
        memory: bool = True,
        fold_every: int = 64,
        drift_bound: float | None = None,
        storage: SolverStorage = SolverStorage(),  # noqa: B008 - frozen
        slack: float = 1.0,
        slack_alone: float | None = None,
    ) -> None:
        self.slack, self.slack_alone = slack, slack if slack_alone is None else slack_alone
        if not (0 <= self.slack < float("inf") and 0 <= self.slack_alone < float("inf")):
            raise ValueError(f"slack must not be negative or infinite, got {slack} and {slack_alone}")
        if memory and (self.slack, self.slack_alone) != (1.0, 1.0):
            raise ValueError("facts are remembered in least squares: with memory the slack is 1")
        super().__init__(prior, d_out, memory, fold_every, drift_bound, storage)
        self._factorised: Tensor | None = None  # the prior's Cholesky factor, once it is wanted

    def fork(self) -> RidgeSolver:
        """Return a solver in the same state to try steps on; it shares the matrices and never writes to them."""
        fork = copy.copy(self)
        fork.fold_every = _NEVER
        return fork

    @exact
    def preview(self, keys: Tensor, residuals: Tensor) -> RidgeStep:
        """Solve with a further block of facts, ``(d_in, b)`` and ``(d_out, b)``, without changing the state.

        Residuals are relative to the original weights with ``memory``, else to the current ones.

        Raises:
            ValueError: If the shapes do not fit or a value is not finite.
        """
        check_facts(keys, residuals, self.d_in, self.d_out)
        keys, residuals = self._in_rows(keys), self._in_rows(residuals)
        gain, factor = ridge_gain(self._project(keys), keys, self._slack_of(keys))
        missing = residuals - self.delta @ keys if self.memory else residuals
        delta = torch.addmm(self.delta, missing, gain.T)
        return RidgeStep(delta, keys, residuals, factor, change=(missing, gain))

    @exact
    def preview_removal(self, keys: Tensor, residuals: Tensor) -> RidgeStep:
        r"""Solve without some facts that are in, exactly as they were absorbed, by down-dating; the state stays.

        With :math:`S = I - K^\top P K`: :math:`\Delta \leftarrow \Delta - (R - \Delta K) S^{-1} (P K)^\top` and
        :math:`P \leftarrow P + P K S^{-1} (P K)^\top` (Woodbury with the sign turned round). Where :math:`S` is nearly
        singular, a fact that outweighs the prior by far, or rounding has left too few of its digits,
        :math:`P` is factorised anew from the sums.

        Raises:
            ValueError: As :meth:`preview`, or if the solver has no memory (see :meth:`preview_exchange`).
        """
        if not self.memory:
            raise ValueError("without memory blocks are exchanged, not removed: use preview_exchange")
        check_facts(keys, residuals, self.d_in, self.d_out)
        keys, residuals = self._in_rows(keys), self._in_rows(residuals)
        # About what rounding has done to S, for a small difference of large numbers looks like any other.
        noise = float((keys.square() * self._inverse.diagonal().to(keys)[:, None]).sum(0).max())
        noise *= torch.finfo(self._inverse.dtype).eps
        down = removal_gain(self._project(keys), keys, max(1e-6, noise / self.drift_bound))
        if down is None:
            inverse = inverse_spd(self._prior + (self.gram - keys @ keys.T))  # what the sums will be
            delta = (self.cross - residuals @ keys.T) @ inverse
            return RidgeStep(delta, keys, residuals, keys, -1, inverse)
        gain, factor = down
        surplus = self.delta @ keys - residuals
        return RidgeStep(torch.addmm(self.delta, surplus, gain.T), keys, residuals, factor, -1, change=(surplus, gain))

    def preview_exchange(self, old: Sequence[Block], new: Sequence[Block]) -> RidgeStep:
        """Return the solution with new blocks in place of old ones, which are in, for a solver without memory.

        Each block was solved against the prior alone, so its share of the sum can be computed again and exchanged.
        """
        prior = self._prior
        delta = self.delta
        for sign, blocks in ((-1.0, old), (1.0, new)):
            for block in blocks:
                if block.keys.shape[1]:
                    keys, residuals = self._in_rows(block.keys), self._in_rows(block.residuals)
                    slack = self._slack_of(keys)
                    if slack == 1.0:
                        delta = delta + sign * ridge_update(keys, residuals, prior)
                    else:
                        delta = delta + sign * constrained_update(keys, residuals, prior, slack)
        empty = prior.new_empty(self.d_in, 0)
        return RidgeStep(delta, empty, prior.new_empty(self.d_out, 0), empty)

    @exact
    def alone(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return what facts would do if each were alone: :math:`P_\Lambda k` and :math:`1 + k^\top P_\Lambda k`.

        They are ``(d_in, n)``, as the keys, and ``(n,)``; the update of fact :math:`i` alone is
        :math:`r_i (P_\Lambda k_i)^\top` divided by the second.
        """
        keys = self._in_rows(keys)
        if self._gram is None:
            projected = (self._inverse @ keys.to(self._inverse.dtype)).to(keys)
        else:
            projected = torch.cholesky_solve(keys, self._prior_factor())
        return projected, 1.0 + (keys * projected).sum(0)

    def _slack_of(self, keys: Tensor) -> float:
        return self.slack_alone if keys.shape[1] == 1 else self.slack

    def _prior_factor(self) -> Tensor:
        if self._factorised is None:
            self._factorised = self.storage.keep(torch.linalg.cholesky(self._prior))
        return self._factorised

    @exact
    def absorb(self, step: RidgeStep) -> None:
        """Take a previewed block into the state."""
        self.delta = step.delta
        self.blocks += 1
        if step.anew is not None:
            gram, cross = self.gram - step.keys @ step.keys.T, self.cross - step.residuals @ step.keys.T
            self._replace(gram, cross, step.anew)
        else:
            self._append(step.keys, step.residuals, step.factor, step.sign)

    def update(self, keys: Tensor, residuals: Tensor) -> None:
        """Add a block of facts: keys ``(d_in, b)``, residuals ``(d_out, b)``."""
        self.absorb(self.preview(keys, residuals))

    def clearing(self) -> RidgeStep:
        """Return the step to a solution of zero, when no fact holds and what is left of them is rounding."""
        none = self.delta.new_empty(self.d_in, 0)
        return RidgeStep(torch.zeros_like(self.delta), none, self.delta.new_empty(self.d_out, 0), none)

    def solve(self) -> Tensor:
        """Return the running solution ``(d_out, d_in)``, float64."""
        return self.delta


_NEVER = 1 << 62  # facts
