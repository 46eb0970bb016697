"""``config.yaml`` of a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from lit_edit.files.paths import write_atomically


class SaveRunConfig(SaveConfigCallback):
    """Keeps ``config.yaml`` in the run folder and shows the config to the loggers."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file of a new run; that of an earlier process stays until the journal has accepted the settings."""
        if trainer.is_global_zero:
            self._path = Path(trainer.default_root_dir) / self.config_filename
            self._due = self._path.is_file()
            if not self._due:
                self._write()
            self.save_config(trainer, pl_module, stage)

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Write the file where settings that may change have changed."""
        if trainer.is_global_zero and self._due:
            self._write()
            self._due = False

    def _write(self) -> None:
        """Write the file, whole or not at all (Lightning's own way can be cut in the middle)."""
        config = self.config.clone()
        config.ckpt_path = None  # where a run goes on is found anew each time
        text = self.parser.dump(config, skip_none=False)
        write_atomically(self._path, lambda target: target.write_text(text, encoding="utf-8"))

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Send the config to every logger."""
        text = self.parser.dump(self.config, skip_none=False)
        for logger in trainer.loggers:
            logger.log_hyperparams(yaml.safe_load(text))
