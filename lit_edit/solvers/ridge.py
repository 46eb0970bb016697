"""Recursive least squares: the running joint solution of all facts of one layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_edit.errors import ArgumentError
from lit_edit.solvers.functional import check_facts, inverse_spd, ridge_gain


@dataclass(frozen=True)
class RidgeStep:
    """A solved but not yet absorbed block of facts; absorbing it cannot fail.

    Attributes:
        delta: ``(d_out, d_in)``, the layer's whole update after this block.
        keys: ``(d_in, b)``.
        residuals: ``(d_out, b)``.
        projected: ``P K``, ``(d_in, b)``.
        gain: ``(d_in, b)``.
    """

    delta: Tensor
    keys: Tensor
    residuals: Tensor
    projected: Tensor
    gain: Tensor


class RidgeSolver:
    r"""Least squares over a growing set of facts with a fixed prior, in ``O(d_in^2 + d_in d_out)`` per fact.

    After facts :math:`(k_i, r_i)` the solution is :math:`\Delta = A (\Lambda + G)^{-1}` with :math:`G = \sum k k^\top`
    and :math:`A = \sum r k^\top` (D4S, arXiv 2410.23843). :math:`P = (\Lambda + G)^{-1}` and :math:`\Delta` are carried
    along by the Woodbury identity; the state does not grow with the number of facts. The sums are the ground truth:
    when rounding makes :math:`P` drift, it is factorised anew from them.

    The statistics are plain float64 tensors, no buffers: ``module.to(bfloat16)``, autocast and DDP do not reach them.

    Args:
        prior: :math:`\Lambda = \lambda C`, ``(d_in, d_in)``, symmetric positive definite.
        d_out: Rows of the update.
        memory: With ``False`` each block is solved against the prior alone and added up: sequential MEMIT, which
            forgets its earlier keys.
        check_every: Measure the drift of ``P`` every so many blocks.
        drift_bound: Factorise anew when ``|P (prior + G) x - x| / |x|`` exceeds this for a probe ``x``.

    Raises:
        ValueError: If the prior is not square, not finite or not positive definite.

    Example:
        >>> solver = RidgeSolver(torch.eye(2), d_out=1)
        >>> solver.update(torch.tensor([[1.0], [0.0]]), torch.tensor([[2.0]]))
        >>> solver.solve().round(decimals=6)
        tensor([[1., 0.]], dtype=torch.float64)
    """

    def __init__(
        self, prior: Tensor, d_out: int, memory: bool = True, check_every: int = 64, drift_bound: float = 1e-8
    ) -> None:
        if prior.dim() != 2 or prior.shape[0] != prior.shape[1]:
            raise ValueError(f"prior must be square (d_in, d_in), got {tuple(prior.shape)}")
        if not torch.isfinite(prior).all():
            raise ArgumentError(
                "prior holds NaN or infinite values; compute the statistics anew (lit-edit stats --force)"
            )
        self.memory = memory
        self.check_every = check_every
        self.drift_bound = drift_bound
        self.d_in, self.d_out = prior.shape[0], d_out
        self._prior = prior.to(torch.float64, copy=True)
        self.inverse = inverse_spd(self._prior)
        self.gram = torch.zeros_like(self._prior) if memory else None
        self.cross = self._prior.new_zeros(d_out, self.d_in)
        self.delta = self._prior.new_zeros(d_out, self.d_in)
        self.blocks = 0
        self.refactorisations = 0

    def preview(self, keys: Tensor, residuals: Tensor) -> RidgeStep:
        """Solve with a further block of facts, without changing the state.

        Args:
            keys: ``(d_in, b)``.
            residuals: ``(d_out, b)``; relative to the original weights when ``memory``, else to the current ones.

        Raises:
            ValueError: If the shapes do not fit or a value is not finite.
        """
        check_facts(keys, residuals, self.d_in, self.d_out)
        keys, residuals = keys.to(self._prior), residuals.to(self._prior)
        projected = self.inverse @ keys
        gain = ridge_gain(projected, keys)
        missing = residuals - self.delta @ keys if self.memory else residuals
        return RidgeStep(torch.addmm(self.delta, missing, gain.T), keys, residuals, projected, gain)

    def absorb(self, step: RidgeStep) -> None:
        """Take a previewed block into the state."""
        self.delta = step.delta
        self.cross.addmm_(step.residuals, step.keys.T)
        self.blocks += 1
        if self.gram is None:
            return
        self.gram.addmm_(step.keys, step.keys.T)
        self.inverse.addmm_(step.gain, step.projected.T, alpha=-1.0)
        if self.blocks % self.check_every == 0 and self.drift() > self.drift_bound:
            self.refactorise()

    def update(self, keys: Tensor, residuals: Tensor) -> None:
        """Add a block of facts: keys ``(d_in, b)``, residuals ``(d_out, b)``."""
        self.absorb(self.preview(keys, residuals))

    def solve(self) -> Tensor:
        """Return the running solution ``(d_out, d_in)``, float64."""
        return self.delta

    def drift(self) -> float:
        """Return ``|P (prior + G) x - x| / |x|`` for a fixed probe: how far rounding has carried ``P`` away."""
        probe = torch.linspace(-1.0, 1.0, self.d_in, dtype=torch.float64, device=self._prior.device)
        image = self._prior @ probe if self.gram is None else self._prior @ probe + self.gram @ probe
        return float(torch.linalg.vector_norm(self.inverse @ image - probe) / torch.linalg.vector_norm(probe))

    def refactorise(self) -> None:
        """Compute ``P`` and the solution anew from the sums."""
        if self.gram is None:
            return
        self.inverse = inverse_spd(self._prior + self.gram)
        self.delta = self.cross @ self.inverse
        self.refactorisations += 1

    def state_dict(self) -> dict[str, Tensor | int]:
        """Return the state: tensors and integers, independent of the solver."""
        state: dict[str, Tensor | int] = {
            "cross": self.cross.clone(),
            "delta": self.delta.clone(),
            "blocks": self.blocks,
            "refactorisations": self.refactorisations,
        }
        if self.gram is not None:
            state |= {"gram": self.gram.clone(), "inverse": self.inverse.clone()}
        return state

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        """Restore :meth:`state_dict`, bit for bit; ``state`` is copied, and a state that does not fit changes nothing.

        Raises:
            ValueError: If the state belongs to a layer of another size or to the other kind of memory.
        """
        if ("gram" in state) != self.memory:
            raise ValueError("the checkpoint was made by an editor with another memory setting; use the same config")
        loaded: dict[str, Tensor] = {}
        for name in ("cross", "delta", *(("gram", "inverse") if self.memory else ())):
            value, own = state[name], getattr(self, name)
            if not isinstance(value, Tensor) or value.shape != own.shape:
                raise ValueError(f"the checkpoint's {name} does not fit a layer of {tuple(own.shape)}")
            loaded[name] = value.to(own, copy=True)
        for name, value in loaded.items():
            setattr(self, name, value)
        self.blocks = int(state["blocks"])
        self.refactorisations = int(state["refactorisations"])
