"""The updates as an adapter: what is kept, what is lost, and that peft makes the same model of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor

from lit_edit.errors import ArgumentError
from lit_edit.export.lora import adapter_card, export_lora, factorise, measure_truncation
from lit_edit.export.model import ExportError
from lit_edit.ledger.edit_ledger import EditLedger, LayerUpdate, LedgerEntry
from lit_edit.metrics.evaluation import evaluate_edits, summarise
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.language_model import LanguageModel
from lit_edit.testing import TINY_CONFIGS, tiny_model, tiny_requests, tiny_tokenizer

IDS = torch.tensor([[5, 6, 7, 8, 9]])
NASTY = "<script>alert(1)</script> | [x](http://a) `b` **c** _d_ \\| # ~ &amp;\nnew | line\r\n---\n\u2028end"
BASE = LanguageModel("some/model")

pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # peft asks transformers for it
]


def matrix(rows: int, columns: int, rank: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(*shape, generator=generator).double() for shape in ((rows, rank), (rank, columns)))
    return 0.1 * left @ right


def edited(
    family: str = "llama", ranks: tuple[int, ...] = (3, 5), layers: tuple[int, ...] = (1, 2), **model: Any
) -> Any:
    """A ledger whose updates have these ranks, layer by layer."""
    ledger = EditLedger(ModelAdapter(tiny_model(family, **model)), layers)
    updates = [
        LayerUpdate(layer, name, matrix(*ledger.adapter.shape(layer), rank, seed=layer))
        for (layer, name), rank in zip(ledger.names.items(), ranks, strict=True)
    ]
    ledger.commit(updates, [LedgerEntry(str(n), "Italy", "The capital of Italy is", NASTY) for n in range(max(ranks))])
    return ledger


def loaded(folder: Path, family: str = "llama", **model: Any) -> Any:
    return PeftModel.from_pretrained(tiny_model(family, **model), str(folder))


# ---- factors ------------------------------------------------------------------------------------------------------


def test_an_update_of_low_rank_loses_nothing() -> None:
    delta = matrix(20, 30, 4)
    part = factorise({"w": delta})["w"]
    assert (part.up.shape, part.down.shape) == ((20, 4), (4, 30))
    assert part.up.dtype == part.down.dtype == torch.float32
    assert (part.needed, part.exact) == (4, True)
    assert part.error < 1e-6
    torch.testing.assert_close(part.product(), delta, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_smaller_rank_is_the_best_there_is_and_says_what_it_lacks(rank: int) -> None:
    delta = matrix(20, 30, 4)
    part = factorise({"w": delta}, rank)["w"]
    values = torch.linalg.svdvals(delta)
    assert (part.up.shape[1], part.needed, part.exact) == (rank, 4, False)
    assert part.error == pytest.approx((values[rank:].norm() / values.norm()).item(), rel=1e-5)
    assert part.error == pytest.approx(((delta - part.product()).norm() / delta.norm()).item(), rel=1e-9)


def test_layers_share_one_rank() -> None:
    parts = factorise({"a": matrix(20, 30, 2), "b": matrix(20, 30, 6), "c": torch.zeros(20, 30)})
    assert [part.needed for part in parts.values()] == [2, 6, 0]
    assert all(part.up.shape[1] == part.down.shape[0] == 6 for part in parts.values())
    assert all(part.exact and part.error < 1e-6 for part in parts.values())
    assert not parts["a"].up[:, 2:].any()
    parts = factorise({"a": matrix(20, 30, 2), "b": matrix(20, 30, 6)}, rank=3)
    assert [part.exact for part in parts.values()] == [True, False]


def test_no_more_rank_is_taken_than_is_needed() -> None:
    assert factorise({"w": matrix(20, 30, 4)}, 100)["w"].up.shape[1] == 4


def test_what_float32_cannot_hold_does_not_count() -> None:
    noise = 1e-10 * matrix(20, 30, 20, seed=1)
    assert factorise({"w": matrix(20, 30, 4) + noise})["w"].needed == 4
    assert factorise({"w": matrix(20, 30, 4) + 1e5 * noise})["w"].needed == 20
    assert factorise({"w": 1e-30 * matrix(20, 30, 4)})["w"].needed == 4  # relative to the update


def test_the_factors_are_of_one_size() -> None:
    part = factorise({"w": 1e6 * matrix(20, 30, 4)})["w"]
    assert part.up.norm().item() == pytest.approx(part.down.norm().item(), rel=1e-4)


def test_updates_of_zeros_have_an_adapter_too() -> None:
    part = factorise({"w": torch.zeros(4, 5, dtype=torch.float64)})["w"]
    assert (part.up.shape, part.needed, part.error) == ((4, 1), 0, 0.0)


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank: int) -> None:
    with pytest.raises(ArgumentError, match="--rank must be at least 1"):
        factorise({"w": matrix(4, 5, 1)}, rank)


# ---- peft ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_peft_makes_the_edited_model_of_the_adapter(tmp_path: Path, family: str) -> None:
    ledger = edited(family)
    export_lora(ledger, tmp_path / "lora", BASE)
    model = loaded(tmp_path / "lora", family)
    with torch.no_grad():
        wanted, base = ledger.adapter.model(IDS).logits, tiny_model(family)(IDS).logits
        torch.testing.assert_close(model(IDS).logits, wanted, rtol=0, atol=1e-5)
        assert not torch.allclose(base, wanted, atol=1e-3)
        with model.disable_adapter():
            torch.testing.assert_close(model(IDS).logits, base, rtol=0, atol=0)
        torch.testing.assert_close(model.merge_and_unload()(IDS).logits, wanted, rtol=0, atol=1e-5)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_of_full_rank(tmp_path: Path, family: str) -> None:
    ledger = edited(family, ranks=(32, 32))
    assert export_lora(ledger, tmp_path / "lora", BASE)[ledger.names[1]].up.shape == (32, 32)
    torch.testing.assert_close(loaded(tmp_path / "lora", family)(IDS).logits, ledger.adapter.model(IDS).logits,
                               rtol=0, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_truncated_adapter_is_the_model_that_was_measured(tmp_path: Path, family: str) -> None:
    ledger = edited(family)
    parts = export_lora(ledger, tmp_path / "lora", BASE, rank=2)
    layers = {name: layer for layer, name in ledger.names.items()}
    view = {name: ledger.edited_weight(layers[name], part.product()) for name, part in parts.items()}
    wanted = torch.func.functional_call(ledger.adapter.model, view, (IDS,)).logits
    found = loaded(tmp_path / "lora", family)(IDS).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert not torch.allclose(found, ledger.adapter.model(IDS).logits, atol=1e-3)


def test_layers_whose_names_are_alike_are_told_apart(tmp_path: Path) -> None:
    ledger = edited(ranks=(2,), layers=(1,), num_hidden_layers=12)
    export_lora(ledger, tmp_path / "lora", BASE)
    model = loaded(tmp_path / "lora", num_hidden_layers=12)
    wrapped = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    assert wrapped == ["base_model.model.model.layers.1.mlp.down_proj"]


def test_many_layers(tmp_path: Path) -> None:
    """From twenty on, peft looks for a shorter list of names that matches the same modules."""
    layers = tuple(range(1, 25))
    ledger = edited(ranks=(1,) * 24, layers=layers, num_hidden_layers=26)
    export_lora(ledger, tmp_path / "lora", BASE)
    model = loaded(tmp_path / "lora", num_hidden_layers=26)
    wrapped = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    assert wrapped == [f"base_model.model.model.layers.{layer}.mlp.down_proj" for layer in layers]
    torch.testing.assert_close(model(IDS).logits, ledger.adapter.model(IDS).logits, rtol=0, atol=1e-4)


def test_an_adapter_of_a_model_in_bfloat16(tmp_path: Path) -> None:
    ledger = edited(dtype=torch.bfloat16)
    export_lora(ledger, tmp_path / "lora", BASE)
    found, wanted = loaded(tmp_path / "lora", dtype=torch.bfloat16)(IDS).logits, ledger.adapter.model(IDS).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.1)
    assert not torch.allclose(tiny_model(dtype=torch.bfloat16)(IDS).logits, wanted, rtol=0, atol=0.5)


# ---- the folder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "transposed"), [("llama", False), ("gpt2", True)])
def test_the_files_are_what_peft_expects(tmp_path: Path, family: str, transposed: bool) -> None:
    (tmp_path / "lora").mkdir()  # an empty folder will do
    ledger = edited(family)
    export_lora(ledger, tmp_path / "lora", LanguageModel("some/model", "v2"))
    names = [name.removesuffix(".weight") for name in ledger.names.values()]
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/model",
        "revision": "v2",
        "r": 5,
        "lora_alpha": 5,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": names,
        "inference_mode": True,
    }
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / "lora" / "adapter_model.safetensors").items()}
    d_out, d_in = ledger.adapter.shape(1)
    assert shapes == {
        f"base_model.model.{name}.lora_{kind}.weight": shape
        for name in names
        for kind, shape in (("A", (5, d_in)), ("B", (d_out, 5)))
    }
    assert [p.name for p in tmp_path.iterdir()] == ["lora"]
    assert len({path.stat().st_mode for path in (tmp_path / "lora").iterdir()}) == 1


def test_a_folder_that_holds_something_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(ExportError, match="not empty"):
        export_lora(edited(), tmp_path, BASE)
    with pytest.raises(ExportError, match="is a file"):
        export_lora(edited(), tmp_path / "keep.txt", BASE)
    assert [p.name for p in tmp_path.iterdir()] == ["keep.txt"]


@pytest.mark.parametrize("part", ["save_tensors", "adapter_config", "adapter_card"])
def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(f"lit_edit.export.lora.{part}", fail)
    with pytest.raises(OSError, match="disk full"):
        export_lora(edited(), tmp_path / "lora", BASE)
    assert list(tmp_path.iterdir()) == []


def test_no_edits_make_no_adapter(tmp_path: Path) -> None:
    unedited, emptied = (EditLedger(ModelAdapter(tiny_model()), (1,)) for _ in range(2))
    rounding = 1e-17 * matrix(*emptied.adapter.shape(1), 32)
    emptied.commit([LayerUpdate(1, emptied.names[1], rounding)], [])  # as edits leave it that are all taken out
    for ledger in (unedited, emptied):
        with pytest.raises(ExportError, match="no edit holds"):
            export_lora(ledger, tmp_path / "lora", BASE)
    assert list(tmp_path.iterdir()) == []


def test_the_card_shows_what_users_wrote_and_lets_nothing_become_markup() -> None:
    parts = factorise({"a.weight": matrix(20, 30, 4)}, 2)
    card = adapter_card([LedgerEntry("1", NASTY, NASTY, NASTY)], "```\n<b>model</b>\n---", parts)
    head, _, body = card.partition("---\n\n")
    assert head == "---\nlibrary_name: peft\ntags: [knowledge-editing, lit-edit, lora]\n"
    assert not re.search(r"<(?!!)", body)
    assert "&lt;script&gt;" in body
    assert not re.search(r"(?<!\\)\[x", body)
    assert len([line for line in body.splitlines() if line.startswith("| 1 |")]) == 1
    assert body.count("```") == 2
    assert f"| `a.weight` | 4 | {parts['a.weight'].error:.2g} |" in body
    assert "rank 2, which is an approximation" in body
    assert "holds them completely" in adapter_card([], "m", factorise({"a.weight": matrix(20, 30, 4)}))


# ---- what truncation costs ----------------------------------------------------------------------------------------


def test_the_metrics_are_those_of_the_truncated_model() -> None:
    ledger, requests, tokenizer = edited(), tiny_requests(), tiny_tokenizer()
    before = {r.id: r for r in evaluate_edits(ModelAdapter(tiny_model()), tokenizer, requests)}
    parts = factorise(ledger.deltas, 1)
    whole, cut = measure_truncation(ledger, tokenizer, requests, parts)
    assert whole == summarise(evaluate_edits(ledger.adapter, tokenizer, requests), before)
    truncated = EditLedger(ModelAdapter(tiny_model()), (1, 2))
    truncated.commit([LayerUpdate(layer, n, parts[n].product()) for layer, n in truncated.names.items()], [])
    assert cut == summarise(evaluate_edits(truncated.adapter, tokenizer, requests), before)
    assert whole != cut
    assert whole["locality"]["agreement"] is not None


def test_measuring_leaves_the_model_alone() -> None:
    ledger = edited()
    before = {name: value.clone() for name, value in ledger.adapter.model.named_parameters()}
    measure_truncation(ledger, tiny_tokenizer(), tiny_requests(), factorise(ledger.deltas, 1))
    assert all(torch.equal(value, before[name]) for name, value in ledger.adapter.model.named_parameters())


def test_an_exact_adapter_costs_nothing() -> None:
    ledger = edited()
    whole, cut = measure_truncation(ledger, tiny_tokenizer(), tiny_requests(), factorise(ledger.deltas))
    assert cut["locality"]["agreement"] == whole["locality"]["agreement"]
    assert cut["efficacy"]["magnitude"] == pytest.approx(whole["efficacy"]["magnitude"], abs=1e-6)


def test_without_requests_nothing_is_measured() -> None:
    ledger = edited()
    with pytest.raises(ValueError, match="at least one request"):
        measure_truncation(ledger, tiny_tokenizer(), [], factorise(ledger.deltas))
