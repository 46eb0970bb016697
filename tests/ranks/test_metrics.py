"""The metrics of the library, for those who give every rank other edits: what ranks have seen is put together."""

from __future__ import annotations

import pytest
import torch

from lit_edit.devices.ranks import Ranks
from lit_edit.metrics.classes import Agreement, ExactAccuracy, Success, TextPerplexity
from tests.ranks.together import Found, together

EDITS = 5  # which neither two nor three ranks divide


def measure(ranks: Ranks) -> Found:
    """Update with this rank's edits only, and compute."""
    nlls = [torch.linspace(0.1, 1 + i, 2 + i, dtype=torch.float64) for i in range(EDITS)]
    success, accuracy, agreement, perplexity = Success(), ExactAccuracy(), Agreement(), TextPerplexity()
    for edit, _ in ranks.deal(range(EDITS)):
        success.update(torch.tensor([1.0, edit]), torch.tensor([2.0, 2.0]))
        accuracy.update([torch.tensor([True, edit % 2 == 0]), torch.tensor([edit > 2])])
        agreement.update([torch.tensor([edit, 1])], [torch.tensor([3, 1])])
        perplexity.update([nlls[edit]])
    values = {"success": success, "accuracy": accuracy, "agreement": agreement}
    return {name: float(metric.compute()) for name, metric in values.items()} | perplexity.compute()


@pytest.mark.parametrize("size", [2, 3])
def test_no_edit_is_counted_twice_and_none_is_dropped(size: int) -> None:
    alone = together(1, measure)[0]
    for found in together(size, measure):
        assert found == pytest.approx(alone, rel=1e-12)
