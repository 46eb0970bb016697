"""Whose a model is, and weights that somebody else has written."""

from __future__ import annotations

import copy
import io
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_edit.export.model import export_model
from lit_edit.ledger.edit_ledger import EditLedger, LayerUpdate, LedgerEntry
from lit_edit.ledger.ownership import MARK, WeightsChangedError, owner_of, print_of
from lit_edit.models import ModelAdapter
from lit_edit.models.twin import twin
from lit_edit.testing import tiny_model, tiny_tokenizer

LAYERS = (1, 2)


def ledger_of(model: Any = None, **settings: Any) -> EditLedger:
    return EditLedger(ModelAdapter(tiny_model() if model is None else model), LAYERS, **settings)


def edit(ledger: EditLedger, layers: tuple[int, ...] = LAYERS, scale: float = 0.1) -> None:
    updates = [
        LayerUpdate(layer, ledger.names[layer], scale * torch.ones(ledger.adapter.shape(layer), dtype=torch.float64))
        for layer in layers
    ]
    ledger.commit(updates, [LedgerEntry(str(len(ledger)), "Italy", "The capital of Italy is", "Vienna")])


def weights(ledger: EditLedger) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in ledger.adapter.model.named_parameters()}


# ---- weights that somebody else has written --------------------------------------------------------------------------


def optimise(model: nn.Module, name: str) -> None:
    weight = model.get_parameter(name).requires_grad_(True)
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()
    weight.requires_grad_(False)


def assign(model: nn.Module, name: str) -> None:
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, nn.Parameter(model.get_parameter(name) * 2, requires_grad=False))


def cast(model: nn.Module, name: str) -> None:
    weight = model.get_parameter(name)
    weight.data = weight.data.bfloat16()


WRITERS: dict[str, Callable[[nn.Module, str], object]] = {
    "an optimizer": optimise,
    "an assignment": assign,
    "in place": lambda model, name: model.get_parameter(name).mul_(1.5),
    "one bit": lambda model, name: model.get_parameter(name).view(torch.int32).view(-1)[3:4].bitwise_xor_(1),
    "two numbers that change places": lambda model, name: (
        model.get_parameter(name).view(-1)[-2:].copy_(model.get_parameter(name).view(-1)[-2:].flip(0).clone())
    ),
    "through .data": lambda model, name: model.get_parameter(name).data.neg_(),
    "another type": cast,
    "not a number": lambda model, name: model.get_parameter(name).fill_(float("nan")),
}
EDITED, OTHER = "model.layers.1.mlp.down_proj.weight", "model.layers.3.self_attn.o_proj.weight"
every_writer = pytest.mark.parametrize("how", WRITERS)
every_name = pytest.mark.parametrize("name", [EDITED, OTHER, "model.norm.weight", "model.embed_tokens.weight"])


@every_writer
@every_name
@pytest.mark.parametrize("before", [False, True])
def test_what_somebody_else_has_written_is_seen_before_a_write(how: str, name: str, before: bool) -> None:
    ledger = ledger_of()
    if before:
        edit(ledger)
    with torch.set_grad_enabled(how == "an optimizer"):
        WRITERS[how](ledger.adapter.model, name)
    there, records = weights(ledger), len(ledger.journal)
    for write in (ledger.verify, lambda thorough: edit(ledger), lambda thorough: ledger.restore_base()):
        if name != EDITED and how == "through .data" and write != ledger.verify:
            continue  # PyTorch does not count it: seen by the thorough look at the beginning of each call
        with pytest.raises(WeightsChangedError, match=r"Three ways on: adopt .* restore") as refused:
            write(thorough=True)
        assert refused.value.names == (name,)
    assert len(ledger.journal) == records
    assert all(torch.equal(there[n], value) or value.isnan().all() for n, value in weights(ledger).items())


def test_a_write_that_changes_nothing_is_none() -> None:
    ledger = ledger_of()
    edit(ledger)
    ledger.adapter.model.load_state_dict(ledger.adapter.model.state_dict())
    ledger.adapter.model.get_parameter(OTHER).add_(0.0)
    edit(ledger)
    ledger.verify(thorough=True)


def test_rewriting_puts_edited_layers_back_and_says_what_it_cannot() -> None:
    ledger = ledger_of()
    edit(ledger)
    there = weights(ledger)
    ledger.adapter.model.get_parameter(EDITED).zero_()
    ledger.rewrite()
    assert all(torch.equal(there[name], value) for name, value in weights(ledger).items())
    ledger.adapter.model.get_parameter(OTHER).zero_()
    with pytest.raises(WeightsChangedError, match="load the model again"):
        ledger.rewrite()


def test_a_model_that_is_moved_or_cast_is_taken_along_but_not_one_that_was_written_on_the_way() -> None:
    for foreign in (False, True):
        ledger = ledger_of()
        edit(ledger)
        ledger.adapter.model.to(torch.bfloat16)
        if foreign:
            ledger.adapter.model.get_parameter(EDITED).mul_(2)
            with pytest.raises(WeightsChangedError, match="somebody else"):
                ledger.align()
        else:
            ledger.align()
            edit(ledger, scale=0.2)


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (64, 48), (1500, 3), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_prints_tell_bits_apart(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-100, 100, shape, generator=generator).to(dtype)
    assert print_of(weight) == print_of(weight.clone())
    assert print_of(weight) != print_of(weight[None])
    for index in range(min(weight.numel(), 40)):
        other = weight.clone()
        other.view(-1)[index] += 1
        assert print_of(other) != print_of(weight)
    if weight.dim() == 2 and weight.numel():
        assert print_of(weight.T.contiguous().T) == print_of(weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", [1, 2, 4])
def test_signs_are_seen_however_many_change(dtype: torch.dtype, step: int) -> None:
    weight = torch.randn(2048, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    for part in (weight[:], weight[:2], weight[::2], weight[:, 1:3]):
        before = print_of(weight)
        part[:, ::step].neg_()
        assert print_of(weight) != before


# ---- one model, one ledger -------------------------------------------------------------------------------------------


def test_a_second_ledger_is_refused_while_there_are_edits() -> None:
    first = ledger_of()
    model = first.adapter.model
    second = ledger_of(model)  # nothing was edited: it takes over
    with pytest.raises(WeightsChangedError, match="another ledger by now"):
        edit(first)
    edit(second)
    with pytest.raises(WeightsChangedError, match="holds 1 edit already"):
        ledger_of(model)
    edit(second)  # which goes on
    adopting = ledger_of(model, adopt=True)
    edit(adopting)
    with pytest.raises(WeightsChangedError, match="another ledger by now"):
        second.restore_base()
    adopting.restore_base()
    assert ledger_of(model).held == 0


def test_a_copy_of_an_edited_model_knows_that_it_is_one() -> None:
    ledger = ledger_of()
    assert ledger_of(copy.deepcopy(ledger.adapter.model)).held == 0
    edit(ledger)
    stored = io.BytesIO()
    torch.save(ledger.adapter.model, stored)
    stored.seek(0)
    for copied in (copy.deepcopy(ledger.adapter.model), torch.load(stored, weights_only=False)):
        with pytest.raises(WeightsChangedError, match="copy of an edited model"):
            ledger_of(copied)
        edit(ledger_of(copied, adopt=True))
        assert owner_of(copied) is not owner_of(ledger.adapter.model)


def test_twins_and_state_dicts_know_nothing_of_it() -> None:
    ledger = ledger_of()
    edit(ledger)
    twin(ledger.adapter)
    assert not [name for name in ledger.adapter.model.state_dict() if "lit_edit" in name]


def test_a_model_that_nobody_holds_goes_with_its_ledger() -> None:
    import gc

    ledger = ledger_of()
    gone = weakref.ref(ledger.adapter.model)
    del ledger
    gc.collect()
    assert gone() is None


def test_an_exported_model_says_that_it_is_edited(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ledger = ledger_of()
    edit(ledger)
    export_model(ledger.adapter.model, tiny_tokenizer(), ledger, tmp_path / "edited", "some/base")
    assert json.loads((tmp_path / "edited" / "config.json").read_text())[MARK]["edits"] == 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    assert all(torch.equal(weights(ledger)[name], value) for name, value in loaded.named_parameters())
    with pytest.raises(WeightsChangedError, match="exported with 1 edit in it, made on 'some/base'"):
        ledger_of(loaded)
    edit(ledger_of(loaded, adopt=True))
    assert MARK not in json.loads(ledger.adapter.model.config.to_json_string())
