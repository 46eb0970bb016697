"""Runs a function on several ranks: real processes, a real gloo group, and an end to it in any case."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import multiprocessing.process
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_edit.devices.ranks import Ranks

Found = dict[str, Any]
"""What a rank has found: tensors, and plain data as JSON has it."""

LIMIT = 60.0  # seconds; a start takes a fraction of one

# Ranks are forked from a process that has imported everything and done nothing: fresh, and at once.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "lit_edit.models.sharded_loading",
        "lit_edit.stream.edit_stream",
        "lit_edit.testing",
        "transformers.generation.utils",
        "transformers.models.gpt2.modeling_gpt2",
        "transformers.models.gptj.modeling_gptj",
        "transformers.models.llama.modeling_llama",
    ]
)


class RankFailedError(AssertionError):
    """A rank has raised, ended or hung; the message is its traceback."""


def together(
    size: int, worker: Callable[..., Mapping[str, Any] | None], *args: Any, limit: float = LIMIT, gone: Collection = ()
) -> list[Found]:
    """Run ``worker(ranks, *args)`` on some ranks and return what each has found.

    Args:
        size: How many ranks; a single one has no group.
        worker: A function of a module.
        args: What it is given beside its rank.
        limit: Seconds, after which all ranks are killed.
        gone: Ranks that are to end without an answer.

    Raises:
        RankFailedError: With the traceback of the rank that failed first, or of all that hang.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        places = [(folder, rank, size, limit) for rank in range(size)]
        processes = [_CONTEXT.Process(target=_run, args=(*place, worker, args), daemon=True) for place in places]
        deadline = time.monotonic() + limit + 5  # a rank gives up by itself, and says where it was
        try:
            for process in processes:
                process.start()
            _wait(processes, folder, deadline)
        finally:
            for process in processes:
                process.kill()
                process.join()
        _raise_first(folder, processes, gone)
        return [_read(folder / f"{rank}.found") for rank in range(size) if rank not in gone]


def raised(call: Callable[[], Any]) -> list[str]:
    """Return class and message of what a call raises."""
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    raise AssertionError("nothing was raised")


def _wait(processes: list[Any], folder: Path, deadline: float) -> None:
    """Wait until all have ended; once one has failed the others get a moment to notice."""
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if any(folder.glob("*.error")):
            deadline = min(deadline, time.monotonic() + 15)
        time.sleep(0.02)


def _raise_first(folder: Path, processes: list[Any], gone: Collection[int]) -> None:
    errors = {path: json.loads(path.read_text()) for path in folder.glob("*.error")}
    if errors:
        path = min(errors, key=lambda path: errors[path]["time"])
        raise RankFailedError(f"rank {path.stem} of {len(processes)} failed:\n{errors[path]['traceback']}")
    stuck = [path for path in sorted(folder.glob("*.stuck")) if path.stat().st_size]
    if stuck:
        raise RankFailedError("\n".join(f"rank {path.stem} hung:\n{path.read_text()}" for path in stuck))
    for rank, process in enumerate(processes):
        if (folder / f"{rank}.found").exists() == (rank in gone):
            raise RankFailedError(f"rank {rank} of {len(processes)} ended with exit code {process.exitcode}")


def _run(
    folder: Path, rank: int, size: int, limit: float, worker: Callable[..., Mapping[str, Any] | None], args: Any
) -> None:
    with (folder / f"{rank}.stuck").open("w") as stuck:
        faulthandler.dump_traceback_later(limit, exit=True, file=stuck)
        try:
            torch.set_num_threads(1)
            os.environ["GLOO_SOCKET_IFNAME"] = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
            if size > 1:
                where = f"file://{folder / 'meeting'}"
                patience = timedelta(seconds=limit + 30)
                dist.init_process_group("gloo", init_method=where, rank=rank, world_size=size, timeout=patience)
            found = worker(Ranks.meet(torch.device("cpu")), *args)
            if size > 1:
                dist.destroy_process_group()
            _write(folder / f"{rank}.found", found or {})
        except Exception:
            told = json.dumps({"time": time.time(), "traceback": traceback.format_exc()})
            (folder / f"{rank}.part").write_text(told)
            (folder / f"{rank}.part").rename(folder / f"{rank}.error")
            sys.exit(1)
        finally:
            faulthandler.cancel_dump_traceback_later()


def _write(path: Path, found: Mapping[str, Any]) -> None:
    tensors = {name: value.detach().clone().contiguous() for name, value in found.items() if isinstance(value, Tensor)}
    data = {name: value for name, value in found.items() if name not in tensors}
    save_file(tensors, path, metadata={"data": json.dumps(data)})


def _read(path: Path) -> Found:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["data"]) | {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
