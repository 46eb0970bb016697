"""Step rules, against torch's own optimizer and against the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_edit.targets.steps import Adam, Polyak


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_adam_is_torchs() -> None:
    delta = torch.zeros(2, 5, dtype=torch.float64)
    ours, theirs = Adam(0.3, delta), torch.nn.Parameter(delta.clone())
    optimizer = torch.optim.Adam([theirs], lr=0.3)
    for step in range(12):
        gradient = draw(2, 5, seed=step)
        delta = ours.step(delta, gradient, torch.ones(2))
        theirs.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(delta, theirs.detach(), rtol=1e-12, atol=1e-12)


def test_polyak_takes_a_linear_loss_to_zero_in_one_step() -> None:
    slope, loss = draw(3, 7), torch.tensor([2.0, 0.5, 9.0], dtype=torch.float64)
    start = draw(3, 7, seed=1)
    moved = Polyak(1.0, torch.full((3,), 1e9, dtype=torch.float64), start).step(start, slope, loss)
    left = loss + (slope * (moved - start)).sum(1)
    torch.testing.assert_close(left, torch.zeros_like(left), rtol=0, atol=1e-9)


def test_polyak_is_its_formula() -> None:
    delta, rule = torch.zeros(1, 4, dtype=torch.float64), Polyak(0.5, torch.tensor([3.0]), torch.zeros(1, 4).double())
    square = torch.zeros(4, dtype=torch.float64)
    for step in range(1, 6):
        gradient, loss = draw(1, 4, seed=step), torch.tensor([0.7 * step], dtype=torch.float64)
        square = 0.9 * square + 0.1 * gradient[0] ** 2
        direction = gradient[0] / (square / (1 - 0.9**step)) ** 0.25
        length = min(float(loss / (gradient[0] @ direction)), 1.5 / float(direction.norm()))
        expected = delta[0] - length * direction
        delta = rule.step(delta, gradient, loss)
        torch.testing.assert_close(delta[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("trust", [0.1, 0.4])
def test_no_step_of_polyak_is_longer_than_its_share(trust: float) -> None:
    radius = torch.tensor([2.0, 50.0], dtype=torch.float64)
    rule, start = Polyak(trust, radius, torch.zeros(2, 6).double()), torch.zeros(2, 6, dtype=torch.float64)
    moved = rule.step(start, 1e-3 * draw(2, 6), torch.tensor([5.0, 5.0], dtype=torch.float64))
    torch.testing.assert_close(moved.norm(dim=1), trust * radius, rtol=1e-6, atol=0)


def test_polyak_stays_where_there_is_no_slope() -> None:
    start = draw(2, 3)
    gradient = torch.stack([torch.zeros(3, dtype=torch.float64), draw(3)])
    moved = Polyak(0.3, torch.ones(2).double(), start).step(start, gradient, torch.ones(2).double())
    assert torch.equal(moved[0], start[0])
    assert torch.isfinite(moved).all()
    assert not torch.equal(moved[1], start[1])


def test_edits_do_not_see_each_other() -> None:
    together = Polyak(0.3, torch.ones(3).double(), draw(3, 4))
    alone = [Polyak(0.3, torch.ones(1).double(), draw(1, 4)) for _ in range(3)]
    delta = torch.zeros(3, 4, dtype=torch.float64)
    singles = [delta[row : row + 1] for row in range(3)]
    for step in range(4):
        gradient, loss = draw(3, 4, seed=step), draw(3, seed=step).abs()
        delta = together.step(delta, gradient, loss)
        singles = [
            rule.step(one, gradient[row : row + 1], loss[row : row + 1])
            for row, (rule, one) in enumerate(zip(alone, singles, strict=True))
        ]
    torch.testing.assert_close(delta, torch.cat(singles), rtol=1e-12, atol=1e-12)
