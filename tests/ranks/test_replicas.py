"""Weights that have run apart are found, on the rank and in the layer where they are, by every rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lit_edit.callbacks.replica_check import check_replicas
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lit_edit.devices.ranks import Ranks
from lit_edit.ledger.edit_ledger import EditLedger, LayerUpdate
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.sharded_loading import load_in_parts
from lit_edit.testing import tiny_model
from tests.ranks.together import Found, raised, together

LAYERS = (1, 2, 3)


def next_up(weight: Tensor, row: int, column: int) -> None:
    """Change one weight by one unit in its last place."""
    bits = weight.detach().view({4: torch.int32, 2: torch.int16}[weight.element_size()])
    bits[row, column] += 1


def stream_of(ranks: Ranks, folder: str, cut: bool) -> SimpleNamespace:
    """What the check wants of a stream, after two commits that leave the last layer as it was."""
    if cut:
        model = load_in_parts(Path(folder), init_device_mesh("cpu", (ranks.size,)), torch.device("cpu"), None, None)
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder)
    adapter = ModelAdapter(model.requires_grad_(False))
    adapter.ranks = replace(ranks, lockstep=cut)
    ledger = EditLedger(adapter, LAYERS)
    for factor in (1.0, 2.0):
        delta = factor * torch.linspace(-1, 1, 32 * adapter.shape(1)[1], dtype=torch.float64).view(32, -1)
        ledger.commit([LayerUpdate(layer, ledger.names[layer], delta / layer) for layer in LAYERS[:2]], [])
    return SimpleNamespace(ranks=ranks, ledger=ledger, edits_made=2)


def check(ranks: Ranks, folder: str, cut: bool) -> Found:
    stream = stream_of(ranks, folder, cut)
    check_replicas(stream)
    found: Found = {"same": True}
    for rank in range(ranks.size):
        for layer in LAYERS:
            weight = stream.ledger.adapter.own_weight(layer)
            own = weight.to_local() if isinstance(weight, DTensor) else weight
            before = own.detach().clone()
            if ranks.rank == rank:
                next_up(own, len(own) - 1, own.shape[1] - 1)
                assert (own != before).sum() == 1
            found[f"{rank} {layer}"] = raised(lambda: check_replicas(stream))
            with torch.no_grad():
                own.copy_(before)
            check_replicas(stream)
    # The ledger of one rank alone has run apart: what it would write next is wrong.
    name = stream.ledger.names[1]
    stream.ledger.deltas[name] = stream.ledger.deltas[name] * (1 + 1e-3 * (ranks.rank == 1))
    try:
        check_replicas(stream)
    except RuntimeError as error:
        found["delta"] = [type(error).__name__, str(error)]
    return found


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.float32), ("gpt2", torch.bfloat16)], ids=str)
def test_one_weight_off_by_its_last_bit_is_found(
    family: str, dtype: torch.dtype, size: int, cut: bool, tmp_path: Path
) -> None:
    tiny_model(family, dtype).save_pretrained(tmp_path)
    name = "model.layers.{}.mlp.down_proj.weight" if family == "llama" else "transformer.h.{}.mlp.c_proj.weight"
    for found in together(size, check, str(tmp_path), cut):
        assert found["same"]
        for rank in range(size):
            for layer in LAYERS:
                kind, message = found[f"{rank} {layer}"]
                # Of two whole copies nobody can tell which is right: rank 0's counts.
                named = rank if rank or cut else 1
                assert kind == "ReplicaError"
                assert message.startswith(
                    f"rank {named} has other weights than rank 0 in layer {layer} ({name.format(layer)}) after edit 2: "
                )
        if cut:
            assert found["delta"][0] == "ReplicaError"
            assert found["delta"][1].startswith("rank 1 has other weights than rank 0 in layer 1 ")


def test_one_process_has_nothing_to_compare() -> None:
    check_replicas(SimpleNamespace(ranks=Ranks()))
