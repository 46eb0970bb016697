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

from lit_edit.errors import check_least, check_positive, check_within
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
            check_positive(reference=self.reference)
        check_least(1, samples=self.samples)
        _check_factor(self.factor)
        check_within("[0, 1)", drop=self.drop)


@dataclass(frozen=True)
class AnchoredTargets:
    """What anchoring has made of some targets.

    Attributes:
        targets: ``(d_model, n)``.
        dropped: ``(n,)`` bool, which are not edited: their target is what the model says already. Tell the user.
    """

    targets: Tensor
    dropped: Tensor


def anchor_targets(
    targets: Tensor, states: Tensor, outputs: Tensor, reference: float, factor: float = 2.0
) -> AnchoredTargets:
    r"""Rescale what the layer is to write to the reference length, and drop what is far beyond it.

    :math:`z' = (h_0 - v_0) + \rho\, v^* / \|v^*\|`; where :math:`\|v^*\| > factor \cdot \rho`, :math:`v^*` becomes
    :math:`v_0`, so that :math:`z' = h_0`: nothing is to change. A :math:`v^*` of zeros has no direction, and stays.

    Args:
        targets: :math:`z`, ``(d_model, n)``.
        states: :math:`h_0`, ``(d_model, n)``, the unchanged states.
        outputs: :math:`v_0`, ``(d_model, n)``, what the MLP adds to them.
        reference: :math:`\rho`, of :func:`reference_norm`.
        factor: 2 as published; infinite drops none.

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
    if targets.dim() != 2:
        raise ValueError(f"targets must be (d_model, n), got shape {tuple(targets.shape)}")
    for name, value in (("states", states), ("outputs", outputs)):
        if value.shape != targets.shape:
            shape = tuple(targets.shape)
            raise ValueError(f"{name} must be of the shape of targets, {shape}, got {tuple(value.shape)}")
    check_positive(reference=reference)
    _check_factor(factor)
    rest = states - outputs
    values = targets - rest
    if not torch.isfinite(values).all():
        raise FactsError("targets hold NaN or infinite values; the edit is refused and the weights stay as they are")
    norms = torch.linalg.vector_norm(values, dim=0)
    dropped = norms > factor * reference
    anchored = rest + values * torch.where(norms > 0, reference / norms, torch.ones_like(norms))
    return AnchoredTargets(torch.where(dropped, states, anchored), dropped)


def reference_norm(norms: Iterable[float], drop: float = 0.05) -> float:
    r"""Return :math:`\rho`: the mean length of :math:`v^*` over edits of the original model, without the largest ones.

    A share ``drop`` of them is left out, rounded down: fewer than 20 lengths lose none at 0.05.

    Raises:
        ValueError: If there are no lengths, one is negative or not finite, all are zero, or ``drop`` is not in [0, 1).

    Example:
        >>> reference_norm([1.0] * 19 + [100.0])
        1.0
    """
    known = sorted(float(norm) for norm in norms)
    check_within("[0, 1)", drop=drop)
    if not known:
        raise ValueError("norms must hold at least one length, got none")
    if wrong := [norm for norm in known if not 0 <= norm < math.inf]:
        raise ValueError(f"norms must be finite and not negative, got {wrong[0]}")
    kept = known[: len(known) - math.floor(drop * len(known) + 1e-9)]  # 0.05 * 20 is one, not a hair less
    mean = math.fsum(kept) / len(kept)
    check_positive(reference=mean)
    return mean


def _check_factor(factor: float) -> None:
    if not factor > 0:  # infinite: nothing is dropped
        raise ValueError(f"factor must be positive, got {factor}")
