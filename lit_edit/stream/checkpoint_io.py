"""Lightning's checkpoints as trees on disk."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lit_edit.files.trees import load_tree, save_tree


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints as files of :func:`save_tree`.

    Solver states are as large as the model; a file takes its name only once it is complete and on disk. Paths that are
    not local are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: What to write.
            path: Where to.
            storage_options: Not supported, as in the base class.

        Raises:
            TypeError: If the checkpoint holds what no file of ours can.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            save_tree(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint.

        Args:
            path: The file.
            map_location: Where tensors go, if it is a device; else they stay in host memory.
            weights_only: Of no consequence: nothing is unpickled either way.

        Raises:
            CheckpointError: If the file cannot be read.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        return load_tree(path, map_location if isinstance(map_location, (str, torch.device)) else "cpu")
