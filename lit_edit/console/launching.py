"""Starting the other processes of a node, and watching over them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

GRACE = 20.0
"""Seconds that the leader has, after another process has failed, to notice and to end in its own words."""


class WatchingLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher, but for its observer, which kills this process without a word when another has failed."""

    def __init__(self, environment: Any, processes: int, nodes: int, advice: str) -> None:
        super().__init__(environment, processes, nodes)
        self.advice = advice

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the other processes, then call the function."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            watch(self.procs, self.advice)
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)


def watch(processes: list[subprocess.Popen[Any]], advice: str, grace: float = GRACE, every: float = 0.5) -> None:
    """Watch over the processes of ranks 1, 2, ..., in a thread: when one fails and nothing comes of it, end all.

    There are ``grace`` seconds between a failure and the end, and ``every`` seconds between two looks; ``advice`` is
    the command that goes on.
    """

    def look() -> None:
        while True:
            time.sleep(every)
            states = [process.poll() for process in processes]
            failed = [rank for rank, state in enumerate(states, 1) if state]
            if failed:
                break
            if all(state == 0 for state in states):
                return
        time.sleep(grace)  # mostly this process is gone by then: its next exchange has failed
        names = ", ".join(f"rank {rank} (process {processes[rank - 1].pid})" for rank in failed)
        sys.stderr.write(f"\nlit-edit: error: {names} has ended. What was made is not lost; go on with\n  {advice}\n")
        sys.stderr.flush()
        for process in processes:
            if process.poll() is None:
                process.kill()
        os._exit(1)

    threading.Thread(target=look, name="ranks", daemon=True).start()
