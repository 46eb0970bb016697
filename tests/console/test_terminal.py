"""Messages and progress bars on one screen."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

SCRIPT = """
import logging, sys, warnings
from tqdm import tqdm
library = logging.getLogger("transformers")
library.addHandler(logging.StreamHandler())  # as libraries bring their own
library.propagate = False
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lit_edit.console.terminal import show_messages
show_messages()
show_messages()
bar = Tqdm(total=4, desc="edits", file=getattr(sys, sys.argv[1]))
inner = tqdm(total=2, desc="key statistics")
for step in range(4):
    bar.update()
    logging.getLogger("lit_edit.some").info("note %d", step)
    library.warning("library %d", step)
    warnings.warn(f"warning {step}")
inner.close()
bar.close()
logging.getLogger("lit_edit.some").warning("last\\nof two lines")
"""
MESSAGES = [f"{what} {step}" for step in range(4) for what in ("note", "library", "warning")]


def screen(output: str) -> list[list[str]]:
    """The lines of what was written; of each what stood in it, one after another, at its beginning."""
    lines = output.replace("\x1b[A", "\n").replace("\r\n", "\n").split("\n")
    return [[part for part in line.split("\r") if part.strip()] for line in lines]


def on_a_terminal(words: list[str], folder: Path, environment: dict[str, str]) -> str:
    """Run a program in a terminal of its own, of 100 columns."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    process = subprocess.Popen(words, stdin=slave, stdout=slave, stderr=slave, cwd=folder, env=environment)
    os.close(slave)
    found = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # Linux says so at the end
            break
        if not part:
            break
        found += part
    os.close(master)
    assert process.wait() == 0, found.decode()
    return found.decode()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_each_message_has_a_line_of_its_own_beside_bars(tmp_path: Path, stream: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", SCRIPT, stream]
    terminal = on_a_terminal(words, tmp_path, environment)
    piped = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stderr
    for output in (terminal, piped):
        assert "edits" in output or stream == "stdout"
        lines = screen(output)
        for message in MESSAGES:
            # Begins at the start of a line that the bar has been wiped from, and ends with it. Once, not twice.
            (line,) = [line for line in lines if any(message in part for part in line)]
            assert line[-1].startswith((message, f"[transformers] {message}", "<string>"))  # a warning says where
            assert message in line[-1]
        assert [["last"], ["of two lines"]] in [lines[i : i + 2] for i in range(len(lines))]


def test_who_has_set_logging_up_keeps_it(tmp_path: Path) -> None:
    script = (
        "import logging; logging.basicConfig(format='mine: %(message)s', level=20)\n"
        "from lit_edit.console.terminal import show_messages\n"
        "show_messages(); logging.getLogger('lit_edit.x').info('hello')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert found.stderr == "mine: hello\n"
