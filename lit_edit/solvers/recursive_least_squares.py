"""Recursive least squares: the running joint solution of all facts of one layer."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from lit_edit.devices.algebra import algebra_dtype, without_autocast
from lit_edit.errors import ArgumentError
from lit_edit.files.checksum import checksum
from lit_edit.solvers.functional import (
    check_facts,
    constrained_update,
    inverse_spd,
    removal_gain,
    ridge_gain,
    ridge_update,
)
from lit_edit.solvers.storage import SolverStorage

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class RidgeStep:
    """A solved but not yet absorbed block of facts; absorbing it cannot fail.

    Attributes:
        delta: ``(d_out, d_in)``, the layer's whole update after this block.
        keys: ``(d_in, b)``.
        residuals: ``(d_out, b)``.
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
    """Facts that were solved together.

    Attributes:
        keys: ``(d_in, b)``.
        residuals: ``(d_out, b)``.
    """

    keys: Tensor
    residuals: Tensor


def _exact(method: Callable[Concatenate[RidgeSolver, P], R]) -> Callable[Concatenate[RidgeSolver, P], R]:
    """Make a method compute in the solver's types inside autocast as well, which rounds products of float32."""

    @wraps(method)
    def run(self: RidgeSolver, *args: P.args, **kwargs: P.kwargs) -> R:
        with without_autocast(self.delta.device):
            return method(self, *args, **kwargs)

    return run


class RidgeSolver:
    r"""Least squares over a growing set of facts with a fixed prior, in ``O(d_in^2 + d_in d_out)`` per fact.

    After facts :math:`(k_i, r_i)` the solution is :math:`\Delta = A (\Lambda + G)^{-1}` with :math:`G = \sum k k^\top`
    and :math:`A = \sum r k^\top` (D4S, arXiv 2410.23843). :math:`P = (\Lambda + G)^{-1}` and :math:`\Delta` are carried
    along by the Woodbury identity; the state does not grow with the number of facts.

    The latest facts are kept as columns (:math:`P = P_0 - V S V^\top` with signs :math:`S`) and folded into the
    matrices ``fold_every`` at a time, by one matrix product: between two folds a fact reads ``P`` once and writes no
    matrix of that size. The sums are the ground truth: when rounding makes :math:`P` drift, it is factorised anew.

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
        if prior.dim() != 2 or prior.shape[0] != prior.shape[1]:
            raise ValueError(f"prior must be square (d_in, d_in), got {tuple(prior.shape)}")
        if not torch.isfinite(prior).all():
            raise ArgumentError(
                "prior holds NaN or infinite values; compute the statistics anew (lit-edit stats --force)"
            )
        if fold_every < 1:
            raise ValueError(f"fold_every must be at least 1, got {fold_every}")
        self.memory, self.fold_every, self.storage = memory, fold_every, storage
        self.drift_bound = drift_bound or (1e-8 if storage.inverse_dtype == torch.float64 else 1e-3)
        self.d_in, self.d_out = prior.shape[0], d_out
        placed = storage.place(prior)
        self._prior = storage.keep(placed.to(algebra_dtype(placed.device), copy=True))
        self._inverse = inverse_spd(self._prior).to(storage.inverse_dtype)
        self._gram: Tensor | None = None  # of the folded facts; none yet
        self._cross: Tensor | None = None
        self._columns = [self._prior.new_empty(n, 0) for n in (self.d_in, d_out, self.d_in, 1)]
        self.delta = self._prior.new_zeros(d_out, self.d_in)
        self.blocks = 0
        self.refactorisations = 0
        self._factorised: Tensor | None = None  # the prior's Cholesky factor, once it is wanted

    @property
    def prior_checksum(self) -> str:
        """Digits that tell priors apart."""
        return checksum(self._prior)

    @property
    @_exact
    def gram(self) -> Tensor:
        r"""``(d_in, d_in)``, :math:`G = \sum k k^\top` of the facts remembered; zero without memory."""
        if not self.memory:
            return torch.zeros_like(self._prior)
        keys, _, _, signs = self._columns
        latest = (keys * signs) @ keys.T
        return latest if self._gram is None else self._gram + latest

    @property
    @_exact
    def cross(self) -> Tensor:
        r"""``(d_out, d_in)``, :math:`A = \sum r k^\top`."""
        keys, residuals, _, signs = self._columns
        latest = (residuals * signs) @ keys.T
        return latest if self._cross is None else self._cross + latest

    @property
    @_exact
    def inverse(self) -> Tensor:
        r"""``(d_in, d_in)``, :math:`P = (\Lambda + G)^{-1}`; without memory that of the prior alone."""
        if not self.memory:
            return self._inverse
        _, _, factor, signs = self._columns
        return torch.addmm(self._inverse.to(factor), factor * signs, factor.T, alpha=-1.0)

    def fork(self) -> RidgeSolver:
        """Return a solver in the same state to try steps on; it shares the matrices and never writes to them."""
        fork = copy.copy(self)
        fork.fold_every = _NEVER
        return fork

    @_exact
    def preview(self, keys: Tensor, residuals: Tensor) -> RidgeStep:
        """Solve with a further block of facts, without changing the state.

        Args:
            keys: ``(d_in, b)``.
            residuals: ``(d_out, b)``; relative to the original weights when ``memory``, else to the current ones.

        Raises:
            ValueError: If the shapes do not fit or a value is not finite.
        """
        check_facts(keys, residuals, self.d_in, self.d_out)
        keys, residuals = self._in_rows(keys), self._in_rows(residuals)
        gain, factor = ridge_gain(self._project(keys), keys, self._slack_of(keys))
        missing = residuals - self.delta @ keys if self.memory else residuals
        delta = torch.addmm(self.delta, missing, gain.T)
        return RidgeStep(delta, keys, residuals, factor, change=(missing, gain))

    @_exact
    def preview_removal(self, keys: Tensor, residuals: Tensor) -> RidgeStep:
        r"""Solve without some facts that are in, by down-dating, without changing the state.

        With :math:`S = I - K^\top P K`: :math:`\Delta \leftarrow \Delta - (R - \Delta K) S^{-1} (P K)^\top` and
        :math:`P \leftarrow P + P K S^{-1} (P K)^\top` (Woodbury with the sign turned round). Where :math:`S` is nearly
        singular, a fact that outweighs the prior by far, or rounding has left too few of its digits,
        :math:`P` is factorised anew from the sums.

        Args:
            keys: ``(d_in, b)``, exactly as they were absorbed.
            residuals: ``(d_out, b)``, likewise.

        Raises:
            ValueError: If the shapes do not fit, a value is not finite, or the solver has no memory
                (see :meth:`preview_exchange`).
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
        """Return the solution with some blocks in place of others, for a solver without memory.

        Each block was solved against the prior alone, so its share of the sum can be computed again and exchanged.

        Args:
            old: Blocks that are in, as they were absorbed.
            new: Blocks to be in instead.
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

    @_exact
    def alone(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return what facts would do if each were alone: :math:`P_\Lambda k` and :math:`1 + k^\top P_\Lambda k`.

        The update of fact :math:`i` alone is :math:`r_i (P_\Lambda k_i)^\top` divided by the second.

        Args:
            keys: ``(d_in, n)``.

        Returns:
            ``(d_in, n)`` and ``(n,)``, float64.
        """
        keys = self._in_rows(keys)
        if self._gram is None:
            projected = (self._inverse @ keys.to(self._inverse.dtype)).to(keys)
        else:
            projected = torch.cholesky_solve(keys, self._prior_factor())
        return projected, 1.0 + (keys * projected).sum(0)

    def _slack_of(self, keys: Tensor) -> float:
        return self.slack_alone if keys.shape[1] == 1 else self.slack

    def _in_rows(self, facts: Tensor) -> Tensor:
        """Return facts in the solver's type, laid out in rows whatever they come from.

        A product may sum in another order for another layout; facts from the record are to give the same bits.
        """
        return facts.to(self._prior.device, self._prior.dtype).clone(memory_format=torch.contiguous_format)

    def _prior_factor(self) -> Tensor:
        if self._factorised is None:
            self._factorised = self.storage.keep(torch.linalg.cholesky(self._prior))
        return self._factorised

    def _project(self, keys: Tensor) -> Tensor:
        """Return ``P K``, float64; without memory that of the prior."""
        projected = (self._inverse @ keys.to(self._inverse.dtype)).to(keys)
        if self.memory and self._columns[2].shape[1]:
            _, _, factor, signs = self._columns
            projected -= (factor * signs) @ (factor.T @ keys)
        return projected

    @_exact
    def absorb(self, step: RidgeStep) -> None:
        """Take a previewed block into the state."""
        self.delta = step.delta
        self.blocks += 1
        if step.anew is not None:
            gram, cross = self.gram, self.cross
            self._gram = self.storage.keep(gram - step.keys @ step.keys.T)
            self._cross = cross - step.residuals @ step.keys.T
            self._inverse = step.anew.to(self.storage.inverse_dtype)
            self._columns = [column[:, :0] for column in self._columns]
            self.refactorisations += 1
            return
        signs = step.keys.new_full((1, step.keys.shape[1]), float(step.sign))
        new = (step.keys, step.residuals, step.factor, signs)
        self._columns = [torch.cat([old, column], 1) for old, column in zip(self._columns, new, strict=True)]
        if self._columns[0].shape[1] >= self.fold_every:
            self._fold()

    def _fold(self) -> None:
        """Move the columns into the matrices."""
        keys, residuals, factor, signs = self._columns
        if self._cross is None:
            self._cross = torch.zeros_like(self.delta)
        self._cross.addmm_(residuals * signs, keys.T)
        if self.memory:
            if self._gram is None:
                self._gram = self.storage.keep(torch.zeros_like(self._prior))
            self._gram.addmm_(keys * signs, keys.T)
            factor, signs = factor.to(self._inverse.dtype), signs.to(self._inverse.dtype)
            self._inverse.addmm_(factor * signs, factor.T, alpha=-1.0)
        self._columns = [column[:, :0] for column in self._columns]
        if self.memory and not self.drift() <= self.drift_bound:
            try:
                self.refactorise()
            except ArgumentError:  # the facts are committed already: go on with what recursion has made
                log.warning(
                    "key statistics cannot be factorised anew (drift %.1e); solutions lose accuracy", self.drift()
                )

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

    @_exact
    def drift(self) -> float:
        """Return ``|P (prior + G) x - x| / |x|`` for a fixed probe: how far rounding has carried ``P`` away."""
        probe = torch.linspace(-1.0, 1.0, self.d_in, dtype=self._prior.dtype, device=self._prior.device)
        keys, _, _, signs = self._columns
        image = self._prior @ probe
        if self._gram is not None:
            image += self._gram @ probe
        if self.memory:
            image += (keys * signs) @ (keys.T @ probe)
        back = self._project(image[:, None])[:, 0]
        return float(torch.linalg.vector_norm(back - probe) / torch.linalg.vector_norm(probe))

    @_exact
    def refactorise(self) -> None:
        """Compute ``P`` and the solution anew from the sums, in place of what recursion has made of them."""
        if not self.memory:
            return
        gram, cross = self.gram, self.cross
        inverse = inverse_spd(self._prior + gram)
        self._inverse = inverse.to(self.storage.inverse_dtype)
        self._gram, self._cross = self.storage.keep(gram), cross
        self._columns = [column[:, :0] for column in self._columns]
        self.delta = cross @ inverse
        self.refactorisations += 1

    def state_dict(self, copy: bool = True) -> dict[str, Tensor | int]:
        """Return the state: tensors and integers.

        Small while no fact is folded yet: the matrices then follow from the prior.

        Args:
            copy: With ``False`` the large tensors are the solver's own, for a state that is written at once.
        """

        def own(value: Tensor) -> Tensor:
            return value.clone() if copy else value

        state: dict[str, Tensor | int] = {
            "memory": int(self.memory),
            "delta": own(self.delta),
            "blocks": self.blocks,
            "refactorisations": self.refactorisations,
        }
        state |= {name: value.clone() for name, value in zip(_COLUMNS, self._columns, strict=True)}
        if self._cross is not None:
            state["cross"] = own(self._cross)
        if self._gram is not None:
            state |= {"gram": own(self._gram), "inverse": own(self._inverse)}
        return state

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        """Restore :meth:`state_dict`, bit for bit; ``state`` is copied, and a state that does not fit changes nothing.

        Raises:
            ValueError: If the state belongs to a layer of another size or to the other kind of memory.
        """
        if bool(state.get("memory", self.memory)) != self.memory:
            raise ValueError("the checkpoint was made by an editor with another memory setting; use the same config")
        square, wide, count = (self.d_in, self.d_in), (self.d_out, self.d_in), _columns_of(state.get("keys"))
        heights = (self.d_in, self.d_out, self.d_in, 1)
        expected = {"delta": wide} | {name: (rows, count) for name, rows in zip(_COLUMNS, heights, strict=True)}
        folded = {"cross": wide, "gram": square, "inverse": square} if self.memory else {"cross": wide}
        if any(name in state for name in folded):  # else they follow from the prior
            expected |= folded
        loaded: dict[str, Tensor] = {}
        for name, shape in expected.items():
            value = state.get(name)
            if not isinstance(value, Tensor) or value.shape != shape:
                raise ValueError(f"the checkpoint's {name} does not fit a layer of {wide}")
            loaded[name] = value.to(self._prior, copy=True)
        inverse = loaded["inverse"] if "inverse" in loaded else inverse_spd(self._prior)
        inverse = inverse.to(self.storage.inverse_dtype)
        self.blocks, self.refactorisations = int(state["blocks"]), int(state["refactorisations"])
        self.delta, self._inverse = loaded["delta"], inverse
        self._columns = [loaded[name] for name in _COLUMNS]
        self._cross = loaded.get("cross")
        self._gram = self.storage.keep(loaded["gram"]) if "gram" in loaded else None


_COLUMNS = ("keys", "residuals", "factor", "signs")
_NEVER = 1 << 62  # facts


def _columns_of(value: Tensor | int | None) -> int:
    return value.shape[1] if isinstance(value, Tensor) and value.dim() == 2 else -1
