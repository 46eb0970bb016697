"""The formulas behind the solvers: pure functions on tensors, columns are facts, deltas are ``(d_out, d_in)``."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_edit.devices.algebra import outside_autocast
from lit_edit.errors import ArgumentError


class FactsError(ValueError):
    """Facts that must not reach any state."""


def check_square(prior: Tensor) -> None:
    """Refuse a prior that is no square matrix."""
    if prior.dim() != 2 or prior.shape[0] != prior.shape[1]:
        raise ValueError(f"prior must be square (d_in, d_in), got {tuple(prior.shape)}")


def check_finite(**values: Tensor) -> None:
    """Refuse the first of some tensors, named in the plural, that is not finite."""
    for name, value in values.items():
        if not torch.isfinite(value).all():
            raise FactsError(
                f"{name} hold NaN or infinite values; the edit is refused and the weights stay as they are"
            )


def check_facts(keys: Tensor, residuals: Tensor, d_in: int, d_out: int) -> None:
    """Check keys ``(d_in, n)`` and residuals ``(d_out, n)`` before they reach any state.

    Raises:
        ValueError: If the shapes do not fit or a value is not finite.
    """
    if keys.dim() != 2 or keys.shape[0] != d_in:
        raise ValueError(f"keys must be (d_in, n) = ({d_in}, n), got {tuple(keys.shape)}")
    if residuals.dim() != 2 or residuals.shape[0] != d_out:
        raise ValueError(f"residuals must be (d_out, n) = ({d_out}, n), got {tuple(residuals.shape)}")
    if keys.shape[1] != residuals.shape[1]:
        raise ValueError(f"keys hold {keys.shape[1]} facts and residuals {residuals.shape[1]}; expected as many")
    check_finite(keys=keys, residuals=residuals)


def _fitting(keys: Tensor, residuals: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """Check facts and the prior; return the facts in its type."""
    check_square(prior)
    check_facts(keys, residuals, prior.shape[0], residuals.shape[0] if residuals.dim() else 0)
    return keys.to(prior), residuals.to(prior)


@outside_autocast
def ridge_update(keys: Tensor, residuals: Tensor, prior: Tensor) -> Tensor:
    r"""Return the joint least-squares delta of a set of facts.

    Solves :math:`\Delta\,(\Lambda + K K^\top) = R K^\top` with :math:`\Lambda = \lambda C`. This is one batch of MEMIT
    (arXiv 2210.07229, eq. 14) and, over all edits of a stream relative to the original weights, D4S (arXiv 2410.23843,
    section 4).

    Args:
        keys: ``(d_in, n)``.
        residuals: ``(d_out, n)``, what the edited layer's output lacks.
        prior: ``(d_in, d_in)``, symmetric positive definite.

    Returns:
        ``(d_out, d_in)`` in the dtype of ``prior``.

    Raises:
        ValueError: If the shapes do not fit, a value is not finite, or ``prior`` is not positive definite.

    Example:
        >>> eye = torch.eye(2, dtype=torch.float64)
        >>> key, residual = torch.tensor([[1.0], [0.0]]), torch.tensor([[2.0]])
        >>> ridge_update(key, residual, eye).round(decimals=6)
        tensor([[1., 0.]], dtype=torch.float64)
    """
    keys, residuals = _fitting(keys, residuals, prior)
    return solve_spd(prior + keys @ keys.T, (residuals @ keys.T).T).T


@outside_autocast
def ridge_gain(projected: Tensor, keys: Tensor, slack: float = 1.0) -> tuple[Tensor, Tensor]:
    r"""Return what a block of facts does to a solution :math:`D` and to :math:`P`.

    With :math:`S = s I + K^\top P K = L L^\top` (Woodbury): the gain :math:`G = P K S^{-1}`, so that
    :math:`D \leftarrow D + (R - D K) G^\top`, and the factor :math:`V = P K L^{-\top}`, so that
    :math:`P \leftarrow P - V V^\top`.

    Args:
        projected: :math:`P K`, ``(d_in, b)``.
        keys: ``(d_in, b)``.
        slack: :math:`s`, 1 in least squares; with 0 the facts hold exactly (ROME), in between nearly (EMMET).

    Returns:
        Gain and factor, each ``(d_in, b)``.

    Raises:
        ValueError: If ``P`` is not positive definite.
    """
    inner = keys.T @ projected
    inner.diagonal().add_(slack)
    lower, info = torch.linalg.cholesky_ex(inner)
    if slack < 1:
        pivots = lower.diagonal().square()
        if info.item() != 0 or not bool((pivots > 1e-12 * inner.diagonal()).all()):
            raise FactsError(_NOT_INDEPENDENT)
    if info.item() != 0:
        raise ArgumentError(_NOT_POSITIVE)
    return _gain_and_factor(lower, projected)


@outside_autocast
def constrained_update(keys: Tensor, residuals: Tensor, prior: Tensor, slack: float = 0.0) -> Tensor:
    r"""Return the delta that makes facts hold and else changes as little as it can.

    :math:`\Delta = R\,(K^\top \Lambda^{-1} K + s I)^{-1} K^\top \Lambda^{-1}` (EMMET, arXiv 2403.14236, eq. 14): of
    all :math:`\Delta` with :math:`\Delta K = R` the one with the least
    :math:`\operatorname{tr} \Delta \Lambda \Delta^\top` where :math:`s = 0`. One fact: ROME (arXiv 2202.05262, eq. 2).
    With :math:`s = 1` it is :func:`ridge_update`.

    Args:
        keys: ``(d_in, n)``.
        residuals: ``(d_out, n)``.
        prior: ``(d_in, d_in)``, symmetric positive definite.
        slack: :math:`s`.

    Returns:
        ``(d_out, d_in)`` in the dtype of ``prior``.

    Raises:
        ValueError: If the shapes do not fit, a value is not finite, ``prior`` is not positive definite, or the keys are
            not independent where there is no slack.

    Example:
        >>> key, residual = torch.tensor([[2.0], [0.0]]), torch.tensor([[2.0]])
        >>> constrained_update(key, residual, torch.eye(2, dtype=torch.float64)) @ key.double()
        tensor([[2.]], dtype=torch.float64)
    """
    keys, residuals = _fitting(keys, residuals, prior)
    gain, _ = ridge_gain(solve_spd(prior, keys), keys, slack)
    return residuals @ gain.T


@outside_autocast
def selected_gain(keys: Tensor, system: Tensor, share: float) -> Tensor:
    r"""Return :math:`G` with :math:`\Delta = R G^\top`, in the rows that keys excite most (NSE, arXiv 2410.04045).

    :math:`G_S = (M_{SS})^{-1} K_S` and zero elsewhere, where :math:`S` is the smallest set of rows that holds a share
    of :math:`\sum_i |k_i|`.

    Args:
        keys: ``(d_in, n)``.
        system: :math:`M`, ``(d_in, d_in)``, symmetric positive definite.
        share: Of the keys' mass, in (0, 1].

    Returns:
        ``(d_in, n)``.

    Raises:
        ValueError: If a key is not finite, or the system is not positive definite.

    Example:
        >>> keys = torch.tensor([[3.0], [-1.0], [0.5]], dtype=torch.float64)
        >>> selected_gain(keys, torch.eye(3, dtype=torch.float64), 0.8).T.tolist()
        [[3.0, -1.0, 0.0]]
    """
    check_finite(keys=keys)
    order = keys.abs().sum(1).sort(descending=True, stable=True)
    mass = order.values.cumsum(0)
    count = len(mass) if share >= 1 else min(len(mass), int((mass < share * mass[-1]).sum()) + 1)
    chosen = order.indices[:count].sort().values
    gain = torch.zeros_like(keys)
    gain[chosen] = solve_spd(system[chosen[:, None], chosen], keys[chosen])
    return gain


@outside_autocast
def removal_gain(projected: Tensor, keys: Tensor, least: float) -> tuple[Tensor, Tensor] | None:
    r"""Return what taking a block of facts out does to a solution :math:`D` and to :math:`P`: :func:`ridge_gain` back.

    With :math:`S = I - K^\top P K = L L^\top`: the gain :math:`G = P K S^{-1}`, so that
    :math:`D \leftarrow D - (R - D K) G^\top`, and the factor :math:`V = P K L^{-\top}`, so that
    :math:`P \leftarrow P + V V^\top`.

    Args:
        projected: :math:`P K`, ``(d_in, b)``.
        keys: ``(d_in, b)``, facts that :math:`P` knows.
        least: Below this pivot of :math:`S` the difference has lost its digits.

    Returns:
        Gain and factor, each ``(d_in, b)``, or ``None`` if :math:`P` must be factorised anew.
    """
    inner = -(keys.T @ projected)
    inner.diagonal().add_(1.0)
    lower, info = torch.linalg.cholesky_ex(inner)
    if info.item() != 0 or bool((lower.diagonal().square() < least).any()):
        return None
    return _gain_and_factor(lower, projected)


def _gain_and_factor(lower: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
    factor = torch.linalg.solve_triangular(lower, projected.T, upper=False).T
    return torch.linalg.solve_triangular(lower.T, factor.T, upper=True).T, factor


def solve_spd(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve ``matrix @ x = right`` by Cholesky.

    Raises:
        ValueError: If ``matrix`` is not positive definite; the message says what to do about it.
    """
    return torch.cholesky_solve(right, _cholesky(matrix))


def inverse_spd(matrix: Tensor) -> Tensor:
    """Return the inverse of a symmetric positive definite matrix, by Cholesky.

    Raises:
        ValueError: If ``matrix`` is not positive definite.
    """
    # In rows whatever LAPACK returns: the order of a sum goes with the layout, and a saved matrix comes back in rows.
    return torch.cholesky_inverse(_cholesky(matrix)).contiguous()


def _cholesky(matrix: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(matrix)
    if info.item() != 0:
        raise ArgumentError(_NOT_POSITIVE)
    return factor


_NOT_INDEPENDENT = (
    "two edits of one step have nearly the same key, or a key is zero: they cannot all hold exactly. Use a larger "
    "slack (model.editor.init_args.slack) or smaller steps (data.batch_size)"
)
_NOT_POSITIVE = (
    "the second moment of the keys is not positive definite: it was computed from too few or too uniform tokens. "
    "Use more tokens (model.statistics.tokens, at least 10 x d_in) or a larger ridge "
    "(model.editor.init_args.ridge)"
)
