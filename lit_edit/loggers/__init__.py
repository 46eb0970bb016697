"""Loggers that know what a run folder is."""

from lit_edit.loggers.run_csv import RunCSVLogger
from lit_edit.loggers.run_wandb import RunWandbLogger

__all__ = ["RunCSVLogger", "RunWandbLogger"]
