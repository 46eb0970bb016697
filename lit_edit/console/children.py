"""Processes that are run one after another, and told when they are to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any


class ProcessLine:
    """Runs processes one at a time; what asks this one to stop is passed on to the one at work.

    Each gets a session of its own, so that a Ctrl-C in the terminal reaches it once, through here. SIGTERM and SIGUSR1
    (SLURM's warning that the time is up) are passed on as well. A second Ctrl-C kills the process at work; a run loses
    nothing by that.
    """

    def __init__(self) -> None:
        self.stopped: signal.Signals | None = None  # by the first that has come; no process is to be started then
        self._process: subprocess.Popen[bytes] | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> ProcessLine:
        if threading.current_thread() is threading.main_thread():  # signals go to the main thread alone
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
        """Run a command to its end, with some variables beside those of this process; ``log`` takes what it writes.

        Returns its exit status; minus the signal's number if one has ended it.
        """
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )
            try:
                if self.stopped is not None:  # it came while the process was being started
                    self._process.send_signal(self.stopped)
                return self._process.wait()
            finally:
                self._process = None

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        again = self.stopped == signal.SIGINT == number
        self.stopped = self.stopped or signal.Signals(number)
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL if again else number)
