"""Several processes of one command: which of them leads, and how the others learn what it has decided.

Lightning starts the other processes of a node itself (they run the same command again), or torchrun and SLURM start all
of them. The leader alone looks at the run folder and changes it.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_only

from lit_edit.errors import ArgumentError

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_DECISION = "LIT_EDIT_DECISION"


@dataclass(frozen=True)
class Decision:
    """What the leader has found out about a run."""

    folder: str
    checkpoint: str | None = None  # where to go on
    ended: bool = False  # whether there is nothing left to do


def leads() -> bool:
    """Tell whether this process is the first of all, before any of them has met another."""
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    rank: int = getattr(rank_zero_only, "rank", 0)
    return rank == 0 and ("RANK" in os.environ or "SLURM_PROCID" in os.environ or node == "0")


def started_together() -> bool:
    """Tell whether torchrun or SLURM has started several processes, which do not know of each other yet."""
    return _started() > 1 and (TorchElasticEnvironment.detect() or SLURMEnvironment.detect())


def _started() -> int:
    return int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))


def job_name() -> str | None:
    """Return a name that all processes of a job know, also when the job is started again."""
    if not started_together():
        return None
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
        return None if job == "none" else f"job-{job}"
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"job-{job}" if array is None else f"job-{array}_{task}"


def handed_down() -> Decision | None:
    """Return what the process that has started this one has decided."""
    told = os.environ.get(_DECISION)
    return None if told is None else Decision(**json.loads(told))


def check_launched(trainer: Trainer) -> None:
    """Refuse to run as one of several processes that do not know of each other: torchrun's or SLURM's, unasked."""
    started = _started()
    if started_together() and started != trainer.world_size:
        raise ArgumentError(
            f"{started} processes were started, and the Trainer is made for {trainer.world_size}: add "
            f"--trainer.strategy ddp (or fsdp2), --trainer.num_nodes, and --trainer.devices (processes of a node)"
        )


def forget_decision() -> None:
    """Let later runs of this process decide anew."""
    os.environ.pop(_DECISION, None)


def share_decision(trainer: Trainer, module: LightningModule, decision: Decision) -> Decision:
    """Return the leader's decision, on every process."""
    from lit_edit.devices.ranks import Ranks

    if trainer.world_size == 1:
        return decision
    if (told := handed_down()) is not None:
        return told
    strategy: Any = trainer.strategy
    if not strategy.cluster_environment.creates_processes_externally:
        os.environ[_DECISION] = json.dumps(asdict(decision))  # for the processes that Lightning is about to start
        return decision
    strategy.connect(module)
    strategy.setup_environment()  # Lightning does the same again later and finds it done
    return Decision(**Ranks.meet(strategy.root_device).agree(asdict(decision)))
