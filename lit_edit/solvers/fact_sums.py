r"""What least squares carries along of its facts: sums, the solution and :math:`P = (\Lambda + G)^{-1}`.

The latest facts are kept as columns (:math:`P = P_0 - V S V^\top` with signs :math:`S`) and folded into the matrices
many at a time, by one matrix product: between two folds a fact reads ``P`` once and writes no matrix of that size. The
sums are the ground truth: when rounding makes :math:`P` drift, it is factorised anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from lit_edit.devices.algebra import algebra_dtype, without_autocast
from lit_edit.errors import ArgumentError, check_least
from lit_edit.files.checksum import checksum
from lit_edit.solvers.functional import check_square, inverse_spd
from lit_edit.solvers.storage import SolverStorage

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="FactSums")


def exact(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Make a method compute in the solver's types inside autocast as well, which rounds products of float32."""

    @wraps(method)
    def run(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        with without_autocast(self.delta.device):
            return method(self, *args, **kwargs)

    return run


class FactSums:
    r"""The sums, the running solution :math:`\Delta` and :math:`P = (\Lambda + G)^{-1}` of the facts of one layer.

    Without ``memory`` keys are not remembered, and :math:`P` is that of the prior alone; the other arguments are those
    of :class:`~lit_edit.solvers.recursive_least_squares.RidgeSolver`.
    """

    def __init__(
        self,
        prior: Tensor,
        d_out: int,
        memory: bool,
        fold_every: int,
        drift_bound: float | None,
        storage: SolverStorage,
    ) -> None:
        check_square(prior)
        if not torch.isfinite(prior).all():
            raise ArgumentError(
                "prior holds NaN or infinite values; compute the statistics anew (lit-edit stats --force)"
            )
        check_least(1, fold_every=fold_every)
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

    @property
    def prior_checksum(self) -> str:
        """Digits that tell priors apart."""
        return checksum(self._prior)

    @property
    @exact
    def gram(self) -> Tensor:
        r"""``(d_in, d_in)``, :math:`G = \sum k k^\top` of the facts remembered; zero without memory."""
        if not self.memory:
            return torch.zeros_like(self._prior)
        keys, _, _, signs = self._columns
        latest = (keys * signs) @ keys.T
        return latest if self._gram is None else self._gram + latest

    @property
    @exact
    def cross(self) -> Tensor:
        r"""``(d_out, d_in)``, :math:`A = \sum r k^\top`."""
        keys, residuals, _, signs = self._columns
        latest = (residuals * signs) @ keys.T
        return latest if self._cross is None else self._cross + latest

    @property
    @exact
    def inverse(self) -> Tensor:
        r"""``(d_in, d_in)``, :math:`P = (\Lambda + G)^{-1}`; without memory that of the prior alone."""
        if not self.memory:
            return self._inverse
        _, _, factor, signs = self._columns
        return torch.addmm(self._inverse.to(factor), factor * signs, factor.T, alpha=-1.0)

    def _in_rows(self, facts: Tensor) -> Tensor:
        """Return facts in the solver's type, laid out in rows whatever they come from.

        A product may sum in another order for another layout; facts from the record are to give the same bits.
        """
        return facts.to(self._prior.device, self._prior.dtype).clone(memory_format=torch.contiguous_format)

    def _project(self, keys: Tensor) -> Tensor:
        """Return ``P K``, float64; without memory that of the prior."""
        projected = (self._inverse @ keys.to(self._inverse.dtype)).to(keys)
        if self.memory and self._columns[2].shape[1]:
            _, _, factor, signs = self._columns
            projected -= (factor * signs) @ (factor.T @ keys)
        return projected

    def _append(self, keys: Tensor, residuals: Tensor, factor: Tensor, sign: int) -> None:
        """Take in facts as columns; with enough of them, fold."""
        signs = keys.new_full((1, keys.shape[1]), float(sign))
        new = (keys, residuals, factor, signs)
        self._columns = [torch.cat([old, column], 1) for old, column in zip(self._columns, new, strict=True)]
        if self._columns[0].shape[1] >= self.fold_every:
            self._fold()

    def _replace(self, gram: Tensor, cross: Tensor, inverse: Tensor) -> None:
        """Put other sums, and the inverse that follows from them, in the place of matrices and columns."""
        self._inverse = inverse.to(self.storage.inverse_dtype)
        self._gram, self._cross = self.storage.keep(gram), cross
        self._columns = [column[:, :0] for column in self._columns]
        self.refactorisations += 1

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

    @exact
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

    @exact
    def refactorise(self) -> None:
        """Compute ``P`` and the solution anew from the sums, in place of what recursion has made of them."""
        if not self.memory:
            return
        gram, cross = self.gram, self.cross
        inverse = inverse_spd(self._prior + gram)
        self._replace(gram, cross, inverse)
        self.delta = cross @ inverse

    def state_dict(self, copy: bool = True) -> dict[str, Tensor | int]:
        """Return the state. It is small while no fact is folded: the matrices then follow from the prior.

        Without ``copy`` the large tensors are the solver's own, for a state that is written at once.
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


def _columns_of(value: Tensor | int | None) -> int:
    return value.shape[1] if isinstance(value, Tensor) and value.dim() == 2 else -1
