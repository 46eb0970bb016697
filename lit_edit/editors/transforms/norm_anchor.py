r"""Norm-anchor scaling: targets whose written part has the length that such parts have on the original model.

Sequential edits are fitted on a model that earlier edits have made louder, and the targets grow with it. NAS (arXiv
2602.02543) splits a target :math:`z = (h_0 - v_0) + v^*`, where :math:`v_0` is the output of the edited MLP at the
lookup token, and rescales :math:`v^*` to a reference length :math:`\rho`. Columns are facts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_edit.solvers.functional import FactsError


@dataclass(frozen=True)
class NormAnchor:
    r"""Settings of norm-anchor scaling, for any editor that fits targets.

    Args:
        reference: :math:`\rho`; by default it is estimated on the original model from the built-in facts.
        samples: How many of those to take.
        factor: Edits whose :math:`v^*` is longer than so many :math:`\rho` change nothing, and a warning says so.
        drop: Share of the longest that the estimate leaves out.

    Raises:
        ValueError: If a number is out of range.
    """

    reference: float | None = None
    samples: int = 40
    factor: float = 2.0
    drop: float = 0.05

    def __post_init__(self) -> None:
        if self.reference is not None:
            _check_reference(self.reference)
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")
        if not self.factor > 0:
            raise ValueError(f"factor must be positive, got {self.factor}")
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop must be in [0, 1), got {self.drop}")


@dataclass(frozen=True)
class AnchoredTargets:
    """What anchoring has made of some targets.

    Attributes:
        targets: ``(d_model, n)``.
        dropped: ``(n,)`` bool, which are not edited: their target is what the model says already. Tell the user.
    """

    targets: Tensor
    dropped: Tensor


def split_targets(targets: Tensor, states: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    r"""Split targets into what the layer is given and what it is to write, :math:`z = (h_0 - v_0) + v^*`.

    Args:
        targets: :math:`z`, ``(d_model, n)``.
        states: :math:`h_0`, ``(d_model, n)``, the unchanged states.
        outputs: :math:`v_0`, ``(d_model, n)``, what the MLP adds to them.

    Returns:
        :math:`h_0 - v_0` and :math:`v^*`, each ``(d_model, n)``.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> rest, value = split_targets(torch.tensor([[5.0]]), torch.tensor([[3.0]]), torch.tensor([[1.0]]))
        >>> rest.item(), value.item()
        (2.0, 3.0)
    """
    _check(targets, states, outputs)
    rest = states - outputs
    return rest, targets - rest


def rescale_values(values: Tensor, reference: float) -> Tensor:
    r"""Give columns the length :math:`\rho`; a column of zeros, which has no direction, stays zero.

    Args:
        values: :math:`v^*`, ``(d_model, n)``.
        reference: :math:`\rho`.

    Returns:
        ``(d_model, n)``.

    Raises:
        ValueError: If ``reference`` is not positive and finite.

    Example:
        >>> rescale_values(torch.tensor([[3.0, 0.0], [4.0, 0.0]]), 10.0)
        tensor([[6., 0.],
                [8., 0.]])
    """
    _check_reference(reference)
    norms = torch.linalg.vector_norm(values, dim=0)
    return values * torch.where(norms > 0, reference / norms, torch.ones_like(norms))


def drop_mask(values: Tensor, reference: float, factor: float = 2.0) -> Tensor:
    r"""Tell which values are too long to be meant: :math:`\|v^*\| > factor \cdot \rho`, before they are rescaled.

    Args:
        values: :math:`v^*`, ``(d_model, n)``.
        reference: :math:`\rho`.
        factor: 2 as published; infinite drops none.

    Returns:
        ``(n,)`` bool.

    Raises:
        ValueError: If a number is out of range.
    """
    _check_reference(reference)
    if not factor > 0:
        raise ValueError(f"factor must be positive, got {factor}")
    return torch.linalg.vector_norm(values, dim=0) > factor * reference


def anchor_targets(
    targets: Tensor, states: Tensor, outputs: Tensor, reference: float, factor: float = 2.0
) -> AnchoredTargets:
    r"""Rescale what the layer is to write to the reference length, and drop what is far beyond it.

    :math:`z' = (h_0 - v_0) + \rho\, v^* / \|v^*\|`; where :math:`\|v^*\| > factor \cdot \rho`, :math:`v^*` becomes
    :math:`v_0`, so that :math:`z' = h_0`: nothing is to change.

    Args:
        targets: :math:`z`, ``(d_model, n)``.
        states: :math:`h_0`, ``(d_model, n)``.
        outputs: :math:`v_0`, ``(d_model, n)``.
        reference: :math:`\rho`, of :func:`reference_norm`.
        factor: 2 as published.

    Raises:
        ValueError: If the shapes do not fit or a number is out of range.
        FactsError: If a target is not finite: it would be dropped, or written, without anybody knowing why.

    Example:
        >>> one = torch.ones(1, 1)
        >>> anchor_targets(4 * one, 2 * one, one, reference=2.0).targets.item()
        3.0
        >>> anchor_targets(9 * one, 2 * one, one, reference=2.0).targets.item()
        2.0
    """
    rest, values = split_targets(targets, states, outputs)
    if not torch.isfinite(values).all():
        raise FactsError("targets hold NaN or infinite values; the edit is refused and the weights stay as they are")
    dropped = drop_mask(values, reference, factor)
    anchored = rest + rescale_values(values, reference)
    return AnchoredTargets(torch.where(dropped, states, anchored), dropped)


def reference_norm(norms: Iterable[float], drop: float = 0.05) -> float:
    r"""Return :math:`\rho`: the mean length of :math:`v^*` over edits of the original model, without the largest ones.

    Args:
        norms: Of the edits.
        drop: Share of the largest that is left out, rounded down: fewer than 20 lengths lose none at 0.05.

    Raises:
        ValueError: If there are no lengths, one is negative or not finite, all are zero, or ``drop`` is not in [0, 1).

    Example:
        >>> reference_norm([1.0] * 19 + [100.0])
        1.0
    """
    known = sorted(float(norm) for norm in norms)
    if not 0 <= drop < 1:
        raise ValueError(f"drop must be in [0, 1), got {drop}")
    if not known:
        raise ValueError("norms must hold at least one length, got none")
    if wrong := [norm for norm in known if not 0 <= norm < math.inf]:
        raise ValueError(f"norms must be finite and not negative, got {wrong[0]}")
    kept = known[: len(known) - math.floor(drop * len(known) + 1e-9)]  # 0.05 * 20 is one, not a hair less
    mean = math.fsum(kept) / len(kept)
    _check_reference(mean)
    return mean


def _check(targets: Tensor, states: Tensor, outputs: Tensor) -> None:
    if targets.dim() != 2:
        raise ValueError(f"targets must be (d_model, n), got shape {tuple(targets.shape)}")
    for name, value in (("states", states), ("outputs", outputs)):
        if value.shape != targets.shape:
            raise ValueError(
                f"{name} must be of the shape of targets, {tuple(targets.shape)}, got {tuple(value.shape)}"
            )


def _check_reference(reference: float) -> None:
    if not 0 < reference < math.inf:
        raise ValueError(f"reference must be positive and finite, got {reference}")
