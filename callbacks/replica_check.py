"""Are the ranks still editing the same model?"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.distributed.tensor import DTensor

from lit_edit.files.checksum import checksum
from lit_edit.models.shards import part_of
from lit_edit.stream.edit_stream import EditStream

from .base import EveryCallback, as_stream, check_every


class ReplicaError(RuntimeError):
    """A rank's weights are not those of the others; the message names rank and layer."""


class ReplicaCheck(EveryCallback):
    """Compares the edited weights of all ranks every ``every`` edits and at the end, and stops on a difference.

    They are compared before the next edit is written, which would cover up what has happened to them since the last.

    Where each rank has the whole layer (DDP), digests of the weights are compared with the leader's. Where it has a
    part (FSDP2), the part is compared with what the edits make of the original weights, and these with the leader's.

    Args:
        every: Compare every so many edits.
    """

    def __init__(self, every: int = 10) -> None:
        super().__init__(check_every(every, "ReplicaCheck: every"))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Compare when it is time."""
        self._look(as_stream(pl_module, self))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Wait for the next edit to begin."""

    def go_on(self, stream: EditStream) -> None:
        """Compare."""
        check_replicas(stream)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare at the end."""
        check_replicas(as_stream(pl_module, self))


@torch.no_grad()
def check_replicas(stream: EditStream) -> None:
    """Compare the edited weights of all ranks.

    Raises:
        ReplicaError: If one of them differs; on every rank.
    """
    if not stream.ranks.together:
        return
    ledger = stream.ledger
    found: list[tuple[str, bool]] = []
    for layer, name in ledger.names.items():
        own, delta = ledger.adapter.own_weight(layer), ledger.deltas.get(name)
        if isinstance(own, DTensor):
            weight = ledger.base[name] if delta is None else ledger.edited_weight(layer, delta)
            found.append((checksum(weight), torch.equal(own.to_local(), part_of(own, weight))))
        else:
            found.append((checksum(own.detach()), True))
    everyone = stream.ranks.gather(found)
    for rank, theirs in enumerate(everyone):
        for (digest, whole), (wanted, _), (layer, name) in zip(theirs, everyone[0], ledger.names.items(), strict=True):
            if digest != wanted or not whole:
                raise ReplicaError(
                    f"rank {rank} has other weights than rank 0 in layer {layer} ({name}) after edit "
                    f"{stream.edits_made}: the ranks have run apart. The journal is whole: start again with --resume "
                    "auto, and if it happens again look at that rank's device"
                )
