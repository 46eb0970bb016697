"""How an edit stream runs on several devices: which of Lightning's strategies fit, and what each needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lit_edit.devices.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 for edit streams, ``trainer.strategy=fsdp2``: every decoder layer is cut over all devices.

    The model is too large for one device then, but its edits are not: a checkpoint holds the edits alone, in one file
    that any number of processes can go on from. Embeddings, final norm and head are on every device.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"tensor_parallel_size": 1, "save_distributed_checkpoint": False, **options})

    def setup_environment(self) -> None:
        """Join the other processes; all of them are one data-parallel group."""
        if self._data_parallel_size == "auto":
            self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def mesh(self) -> DeviceMesh:
        """The devices that a layer is cut over."""
        return self.device_mesh["data_parallel"]

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """No: the model is cut and loaded in ``configure_model`` already."""
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return nothing: the edits are saved by the stream, the model is not."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return nothing: there is no optimizer."""
        return {}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, the same file on every rank."""
        checkpoint: dict[str, Any] = self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)
        return checkpoint


StrategyRegistry.register("fsdp2", ShardedStrategy, description="FSDP2 for edit streams (lit-edit)")


def join_ranks(trainer: Trainer, stream: LightningModule) -> Ranks:
    """Meet the other processes of a Trainer and make everything fit for several of them.

    Raises:
        MisconfigurationException: If the strategy is one that edits cannot be made with.
    """
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, ShardedStrategy):
        raise MisconfigurationException(
            "ModelParallelStrategy saves the state of an optimizer, and there is none: use trainer.strategy=fsdp2, "
            "which is that strategy made for edits"
        )
    if isinstance(strategy, DDPStrategy) and not hasattr(stream, "ddp_anchor"):
        # DDP refuses a module without a parameter that wants a gradient; this one stays zero and is saved nowhere.
        stream.ddp_anchor = nn.Parameter(torch.zeros(()))
    if trainer.world_size == 1 and not isinstance(strategy, ShardedStrategy):
        return Ranks()
    if not isinstance(strategy, (DDPStrategy, ShardedStrategy)) or isinstance(strategy, DeepSpeedStrategy):
        raise MisconfigurationException(
            f"an edit stream runs on {trainer.world_size} devices with trainer.strategy=ddp (a whole model on each) or "
            f"fsdp2 (each layer cut over all of them), got {type(strategy).__name__}"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint):
            # All ranks must save together, and one that fails is alone. Nothing is lost: the journal has every edit.
            callback.save_on_exception = False
    return Ranks.meet(strategy.root_device, lockstep=isinstance(strategy, ShardedStrategy))


def cut_of(trainer: Trainer) -> tuple[DeviceMesh, torch.device] | None:
    """Return the devices that layers are cut over, and this process's own; ``None`` where each has the whole model."""
    strategy = trainer.strategy
    return (strategy.mesh, strategy.root_device) if isinstance(strategy, ShardedStrategy) else None
