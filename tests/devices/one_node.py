"""A SLURM cluster of one node on the loopback address: a real controller, a real node, nothing outside one folder."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "squeue")
SECONDS = 60
GPUS = 8  # files that stand for them: jobs are given some, nothing is computed on them

CONFIGURATION = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
MpiDefault=none
SwitchType=switch/none
TaskPlugin=task/none
ProctrackType=proctrack/linuxproc
ReturnToService=2
JobRequeue=1
KillWait=5
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/node.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=64 Boards=1 SocketsPerBoard=1 CoresPerSocket=64 ThreadsPerCore=1 Gres=gpu:{gpus}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Return why there can be no cluster here, or nothing."""
    absent = [name for name in PROGRAMS if not shutil.which(name)]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: slurmctld, slurmd, slurm-client)"
    return "" if os.getuid() == 0 else "SLURM's node wants to be root"


@contextmanager
def cluster(folder: Path) -> Iterator[Mapping[str, str]]:
    """Start a cluster whose files are in a folder; give the variables under which its commands find it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    for index in range(GPUS):
        (folder / f"gpu{index}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
    settings = {"host": socket.gethostname(), "ports": free_ports(2), "folder": folder, "gpus": GPUS}
    (folder / "slurm.conf").write_text(CONFIGURATION.format_map(settings))
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    started: list[subprocess.Popen[bytes]] = []
    try:
        for program in ("slurmctld", "slurmd"):
            with (folder / f"{program}.log").open("wb") as log:
                command = [program, "-D", "-f", environment["SLURM_CONF"]]
                started.append(
                    subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)
                )
        until(lambda: " idle" in said(["sinfo", "-h", "-o", "%N %T"], environment), "the node does not come up", folder)
        yield {"SLURM_CONF": environment["SLURM_CONF"]}
    finally:
        said(["scancel", "--user=root", "--full"], environment)
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
        for process in started:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def said(command: list[str], environment: Mapping[str, str]) -> str:
    """Return what a command of SLURM says, errors included."""
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    return found.stdout + found.stderr


def until(reached: object, otherwise: str, folder: Path, seconds: float = SECONDS) -> None:
    """Wait until something has come to be."""
    assert callable(reached)
    end = time.monotonic() + seconds
    while not reached():
        logs = "\n".join(f"{log.name}:\n{log.read_text(errors='replace')[-2000:]}" for log in folder.glob("*.log"))
        assert time.monotonic() < end, f"{otherwise}\n{logs}"
        time.sleep(0.5)


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback address that nobody listens at."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports
