"""The ledger: all or nothing, finite or refused, and always ``cast(W0 + delta)``."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch
from torch import Tensor

from lit_edit.ledger.edit_ledger import EditLedger, EditRefusedError, LayerUpdate, LedgerEntry
from lit_edit.models import ModelAdapter
from lit_edit.testing import tiny_model

LAYERS = (1, 2)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
exactly = {"rtol": 0, "atol": 0}


def ledger_of(family: str = "gpt2", dtype: torch.dtype = torch.float32, **settings: object) -> EditLedger:
    return EditLedger(ModelAdapter(tiny_model(family, dtype, **settings)), LAYERS)


def delta(ledger: EditLedger, layer: int, seed: int = 0, scale: float = 0.1) -> Tensor:
    generator = torch.Generator().manual_seed(10 * layer + seed)
    return scale * torch.randn(ledger.adapter.shape(layer), dtype=torch.float64, generator=generator)


def update(ledger: EditLedger, layer: int, value: Tensor | None = None, name: str | None = None) -> LayerUpdate:
    value = delta(ledger, layer) if value is None else value
    return LayerUpdate(layer, ledger.names.get(layer, "?") if name is None else name, value)


def entry(id: str = "a", **facts: float) -> LedgerEntry:
    return LedgerEntry(id, "Italy", "The capital of Italy is", "Vienna", facts)


def weights(ledger: EditLedger) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in ledger.adapter.model.named_parameters()}


def changed(ledger: EditLedger, before: dict[str, Tensor]) -> list[str]:
    return [name for name, value in weights(ledger).items() if not torch.equal(value, before[name])]


# ---- commits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("family", "settings"),
    [("gpt2", {}), ("gpt2", {"n_inner": 32}), ("llama", {}), ("llama", {"intermediate_size": 32})],
)
def test_commit_writes_the_cast_sum_and_nothing_else(family: str, settings: dict[str, int], dtype: torch.dtype) -> None:
    ledger = ledger_of(family, dtype, **settings)
    before = weights(ledger)
    for seed in range(3):  # each commit is relative to W0, not to the commit before
        updates = [update(ledger, layer, delta(ledger, layer, seed)) for layer in LAYERS]
        ledger.commit(updates, [entry(str(seed))])
    assert changed(ledger, before) == list(ledger.names.values())
    for layer in LAYERS:
        change = delta(ledger, layer, 2)
        change = change.T if family == "gpt2" else change  # Conv1D stores (d_in, d_out)
        expected = (before[ledger.names[layer]].double() + change).to(dtype)
        torch.testing.assert_close(ledger.adapter.down_proj(layer).weight.detach(), expected, **exactly)


def test_small_updates_are_not_lost_in_bfloat16() -> None:
    """256 updates of a thousandth of the weight's spacing: added in place they would all round away."""
    ledger = ledger_of(dtype=torch.bfloat16)
    name, base = ledger.names[1], ledger.base[ledger.names[1]].double().T
    step = base.abs() * 2.0**-12
    in_place = ledger.base[name].clone()
    for count in range(1, 257):
        ledger.commit([update(ledger, 1, count * step)], [])
        in_place += step.T.to(torch.bfloat16)
    assert torch.equal(in_place, ledger.base[name])
    moved = ledger.adapter.down_proj(1).weight.double().T - base
    torch.testing.assert_close(moved, 256 * step, rtol=0, atol=base.abs().max().item() * 2**-7)  # one bf16 rounding


def test_weights_stay_the_same_tensors() -> None:
    """Optimizers, views and tied weights hold references."""
    ledger = ledger_of()
    before = ledger.adapter.down_proj(1).weight
    ledger.commit([update(ledger, 1)], [entry()])
    assert ledger.adapter.down_proj(1).weight is before
    ledger.restore_base()
    assert ledger.adapter.down_proj(1).weight is before


# ---- refusals: the first layer's update is always fine, the second is not --------------------------------------------


def bad_updates(ledger: EditLedger) -> dict[str, tuple[LayerUpdate, str]]:
    nan, inf = delta(ledger, 2), delta(ledger, 2)
    nan[0, 0], inf[-1, -1] = float("nan"), -float("inf")
    return {
        "nan": (update(ledger, 2, nan), "edit 'a', 'b' would write NaN or infinite values into transformer.h.2"),
        "inf": (update(ledger, 2, inf), "NaN or infinite"),
        "overflow": (update(ledger, 2, torch.full((32, 128), 1e6, dtype=torch.float64)), "NaN or infinite"),
        "transposed": (
            update(ledger, 2, delta(ledger, 2).T),
            r"must be \(d_out, d_in\) = \(32, 128\), got \(128, 32\)",
        ),
        "short": (update(ledger, 2, torch.zeros(32)), r"got \(32,\)"),
        "other name": (update(ledger, 2, name=ledger.names[1]), "is not among the edited weights"),
        "other layer": (
            update(ledger, 3, name="transformer.h.3.mlp.c_proj.weight"),
            "layer 3.* is not among the edited",
        ),
        "twice": (update(ledger, 1), "is updated twice in one commit"),
    }


@pytest.mark.parametrize("kind", sorted(bad_updates(ledger_of())))
@pytest.mark.parametrize("first", [True, False], ids=["good first", "bad first"])
def test_all_or_nothing(kind: str, first: bool) -> None:
    ledger = ledger_of(dtype=torch.float16)
    ledger.commit([update(ledger, layer, delta(ledger, layer, 5)) for layer in LAYERS], [entry("before")])
    before, state = weights(ledger), deepcopy(ledger.state_dict())
    bad, message = bad_updates(ledger)[kind]
    good = update(ledger, 1)
    with pytest.raises(EditRefusedError, match=message):
        ledger.commit([good, bad] if first else [bad, good], [entry("a"), entry("b")])
    assert changed(ledger, before) == []
    assert [e.id for e in ledger.entries] == ["before"]
    for name, value in state["deltas"].items():
        torch.testing.assert_close(ledger.deltas[name], value, **exactly)


def test_refusal_is_a_value_error_and_large_values_fit_float32() -> None:
    assert issubclass(EditRefusedError, ValueError)
    ledger = ledger_of(dtype=torch.float32)
    ledger.commit([update(ledger, 2, torch.full((32, 128), 1e6, dtype=torch.float64))], [])  # overflows float16 only


# ---- entries and norms -----------------------------------------------------------------------------------------------


def test_entries_are_kept_in_order() -> None:
    ledger = ledger_of()
    ledger.commit([update(ledger, 1)], [entry("a", loss=0.5), entry("b")])
    ledger.commit([], [entry("c")])
    assert [e.id for e in ledger.entries] == ["a", "b", "c"]
    assert len(ledger) == 3
    shown = ledger.entries[0].as_dict()
    assert shown == {
        "id": "a",
        "subject": "Italy",
        "prompt": "The capital of Italy is",
        "target_new": "Vienna",
        "loss": 0.5,
    }
    assert json.loads(json.dumps(shown)) == shown


def test_layer_norms() -> None:
    ledger = ledger_of()
    base = {layer: ledger.base[ledger.names[layer]].double() for layer in LAYERS}
    ledger.commit([update(ledger, 1)], [entry()])
    norms = ledger.layer_norms()
    assert list(norms) == list(ledger.names.values())
    one, two = norms.values()
    change, after = delta(ledger, 1), ledger.adapter.down_proj(1).weight.double()
    assert one["mean_abs_before"] == pytest.approx(base[1].abs().mean().item())
    assert one["mean_abs_after"] == pytest.approx(after.abs().mean().item())
    assert one["mean_abs_delta"] == pytest.approx(change.abs().mean().item())
    assert one["relative_change"] == pytest.approx((change.norm() / base[1].norm()).item())
    assert two["mean_abs_before"] == two["mean_abs_after"] == pytest.approx(base[2].abs().mean().item())
    assert two["mean_abs_delta"] == two["relative_change"] == 0.0


# ---- the original model ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_original_view_computes_with_the_weights_before_all_edits() -> None:
    ledger = ledger_of()
    ids = torch.arange(3, 12)[None]
    mask = torch.ones_like(ids)
    before = ledger.adapter.last_hidden(ids, mask)
    ledger.commit([update(ledger, layer) for layer in LAYERS], [entry()])
    assert not torch.allclose(ledger.adapter.last_hidden(ids, mask), before, atol=1e-3)
    torch.testing.assert_close(ledger.original().last_hidden(ids, mask), before, **exactly)


@pytest.mark.parametrize("dtype", DTYPES)
def test_restore_base_is_bit_identical(dtype: torch.dtype) -> None:
    ledger = ledger_of("llama", dtype)
    before = weights(ledger)
    ledger.commit([update(ledger, layer) for layer in LAYERS], [entry()])
    assert len(changed(ledger, before)) == 2
    ledger.restore_base()
    assert changed(ledger, before) == []
    assert len(ledger) == 0
    assert ledger.deltas == {}


def test_align_follows_the_models_type() -> None:
    ledger = ledger_of()
    original = {name: value.clone() for name, value in ledger.base.items()}
    ledger.commit([update(ledger, 1)], [entry()])
    ledger.adapter.model.to(torch.bfloat16)
    ledger.align()
    assert all(torch.equal(ledger.base[name], value.to(torch.bfloat16)) for name, value in original.items())
    assert ledger.deltas[ledger.names[1]].dtype == torch.float64
    ledger.commit([update(ledger, 2)], [])
    expected = (ledger.base[ledger.names[2]].double() + delta(ledger, 2).T).to(torch.bfloat16)
    torch.testing.assert_close(ledger.adapter.down_proj(2).weight.detach(), expected, **exactly)
    ledger.restore_base()
    for layer in LAYERS:
        found = ledger.adapter.down_proj(layer).weight.detach()
        torch.testing.assert_close(found, original[ledger.names[layer]].to(torch.bfloat16), **exactly)


def test_two_ledgers_are_independent() -> None:
    one, other = ledger_of(), ledger_of()
    before = weights(other)
    one.commit([update(one, 1)], [entry()])
    assert changed(other, before) == []
    assert len(other) == 0
    assert other.deltas == {}


# ---- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_round_trip(dtype: torch.dtype, tmp_path: object) -> None:
    ledger = ledger_of(dtype=dtype)
    ledger.commit([update(ledger, 1)], [entry("a", loss=0.5)])
    ledger.commit([update(ledger, 2)], [entry("b")])
    torch.save(ledger.state_dict(), tmp_path / "ledger.pt")
    fresh = ledger_of(dtype=dtype)
    fresh.commit([update(fresh, 1, delta(fresh, 1, 8))], [entry("other")])
    fresh.load_state_dict(torch.load(tmp_path / "ledger.pt", weights_only=True))
    assert changed(fresh, weights(ledger)) == []
    assert [e.as_dict() for e in fresh.entries] == [e.as_dict() for e in ledger.entries]
    assert fresh.layer_norms() == ledger.layer_norms()


def test_state_is_independent_of_the_ledger() -> None:
    ledger = ledger_of()
    ledger.commit([update(ledger, 1)], [entry()])
    saved = ledger.state_dict()
    ledger.commit([update(ledger, 1, delta(ledger, 1, 3))], [entry("b")])
    torch.testing.assert_close(saved["deltas"][ledger.names[1]], delta(ledger, 1), **exactly)
    assert len(saved["history"]["made"]) == 1


def broken_states(ledger: EditLedger) -> dict[str, tuple[dict[str, object], str]]:
    good = ledger.state_dict()
    return {
        "other layer": (
            {**good, "deltas": {"transformer.h.0.mlp.c_proj.weight": delta(ledger, 1)}},
            r"edits transformer\.h\.0.*, this stream edits layers \[1, 2\]",
        ),
        "other shape": ({**good, "deltas": {ledger.names[1]: torch.zeros(3, 3)}}, r"\(32, 128\), got \(3, 3\)"),
        "nan": ({**good, "deltas": {ledger.names[1]: delta(ledger, 1) * float("nan")}}, "NaN or infinite"),
    }


@pytest.mark.parametrize("kind", ["other layer", "other shape", "nan"])
def test_state_that_does_not_fit_is_refused_and_changes_nothing(kind: str) -> None:
    ledger = ledger_of()
    ledger.commit([update(ledger, layer) for layer in LAYERS], [entry("mine")])
    before = weights(ledger)
    state, message = broken_states(ledger)[kind]
    with pytest.raises(EditRefusedError, match=message):
        ledger.load_state_dict(state)
    assert changed(ledger, before) == []
    assert [e.id for e in ledger.entries] == ["mine"]
    assert set(ledger.deltas) == set(ledger.names.values())
