"""Which of Lightning's strategies a stream takes, and what it changes about a Trainer with several processes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lit_edit.devices.ranks import Ranks
from lit_edit.stream.strategies import ShardedStrategy, cut_of, join_ranks
from tests.ranks.together import Found, together
from tests.streams import make_data, make_stream, make_trainer

CPU = torch.device("cpu")


def fake(strategy: Strategy, world_size: int = 2, callbacks: list[Any] | None = None) -> Any:
    return SimpleNamespace(strategy=strategy, world_size=world_size, callbacks=callbacks or [])


def on_cpu(kind: type[Any], size: int = 2) -> Any:
    strategy = kind()
    strategy.parallel_devices, strategy.cluster_environment = [CPU] * size, LightningEnvironment()
    return strategy


class Another(SingleDeviceStrategy):
    """A strategy that lit-edit has not heard of."""


@pytest.mark.parametrize("world_size", [1, 2])
def test_lightnings_own_model_parallel_is_refused(world_size: int) -> None:
    with pytest.raises(MisconfigurationException, match=r"optimizer, and there is none: use trainer\.strategy=fsdp2"):
        join_ranks(fake(ModelParallelStrategy(), world_size), nn.Module())


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy, Another])
def test_other_strategies_are_refused_on_many_devices(kind: type[Strategy]) -> None:
    strategy = object.__new__(kind)  # what they need is not installed here
    with pytest.raises(MisconfigurationException, match=f"runs on 3 devices with .*=ddp .* got {kind.__name__}"):
        join_ranks(fake(strategy, 3), nn.Module())


def test_one_device_needs_nothing() -> None:
    stream, checkpoint = nn.Module(), ModelCheckpoint()
    saves = checkpoint.save_on_exception = True
    for strategy in (SingleDeviceStrategy(CPU), Another(CPU)):
        trainer = fake(strategy, 1, [checkpoint])
        assert join_ranks(trainer, stream) == Ranks()
        assert cut_of(trainer) is None
    assert not list(stream.parameters())
    assert checkpoint.save_on_exception is saves


@pytest.mark.parametrize("world_size", [1, 2])
def test_ddp_gets_a_parameter_to_hold_on_to(world_size: int) -> None:
    stream, checkpoint = nn.Module(), ModelCheckpoint()
    checkpoint.save_on_exception = True
    trainer = fake(on_cpu(DDPStrategy), world_size, [checkpoint, object()])
    assert join_ranks(trainer, stream) == Ranks()  # nobody has started a group
    (anchor,) = stream.parameters()
    assert anchor.requires_grad
    assert anchor.item() == 0.0
    join_ranks(trainer, stream)
    assert next(stream.parameters()) is anchor
    assert checkpoint.save_on_exception == (world_size == 1)
    assert cut_of(trainer) is None


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_names_are_those_of_a_trainer(strategy: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, strategy=strategy, devices=2)
    kind = {"ddp": DDPStrategy, "fsdp2": ShardedStrategy}[strategy]
    assert isinstance(trainer.strategy, kind)
    assert join_ranks(trainer, nn.Module()) == Ranks()


def test_a_trainer_with_the_wrong_strategy_stops_in_setup(tmp_path: Path) -> None:
    class Quiet(ModelParallelStrategy):
        def setup_environment(self) -> None:
            """Start no group."""

        def model_sharded_context(self) -> Any:
            raise AssertionError("nothing is to be loaded")

    trainer = make_trainer(tmp_path, strategy=Quiet())
    with pytest.raises(MisconfigurationException, match="strategy=fsdp2"):
        trainer.fit(make_stream(), make_data())


def test_fsdp2_saves_the_edits_and_nothing_else() -> None:
    strategy = ShardedStrategy()
    assert strategy.lightning_module_state_dict() == strategy.optimizer_state(None) == {}
    assert not strategy.restore_checkpoint_after_setup
    assert not strategy._save_distributed_checkpoint
    assert strategy._tensor_parallel_size == 1
    assert ShardedStrategy(data_parallel_size=2)._data_parallel_size == 2


# ---- in a group ------------------------------------------------------------------------------------------------------


def join(ranks: Ranks) -> Found:
    found: Found = {}
    for kind in (DDPStrategy, ShardedStrategy):
        checkpoint = ModelCheckpoint()
        checkpoint.save_on_exception = True
        joined = join_ranks(fake(on_cpu(kind, ranks.size), ranks.size, [checkpoint]), nn.Module())
        found[kind.__name__] = [joined.rank, joined.size, joined.lockstep, joined.alike, str(joined.device)]
        found[f"{kind.__name__} saves"] = checkpoint.save_on_exception
        assert joined.places == ranks.places
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_meet(size: int) -> None:
    for rank, found in enumerate(together(size, join)):
        assert found["DDPStrategy"] == [rank, size, False, False, "cpu"]
        assert found["ShardedStrategy"] == [rank, size, True, False, "cpu"]
        assert found["DDPStrategy saves"] == found["ShardedStrategy saves"] == False  # noqa: E712
