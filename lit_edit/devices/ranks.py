"""The processes that work on one edit stream together, and how they agree.

Every rank runs the same program on the same edits. What can be split is dealt out and the parts are put together
again (passes of the target optimisation, key statistics, measurements); what must be one thing (the solve, the journal,
a choice) is done by the leader, rank 0, and told to the others. So a stream on many devices is the stream on one.

What is exchanged are tensors and JSON, never pickled objects.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

Payload = tuple[Any, Mapping[str, Tensor]]
"""Plain data (as JSON has it) and tensors by name."""


class RankError(RuntimeError):
    """A rank has failed or is gone; the message names it where that can be known."""


@dataclass(frozen=True)
class Ranks:
    """One rank's view of all of them.

    Args:
        rank: This one, from 0.
        size: How many there are.
        device: Where tensors are when they are exchanged.
        lockstep: Whether all ranks must run the same layers at the same time, because each holds a part of them: what
            is dealt out is then filled up so that all run equally many passes.
        alike: Whether all ranks must run everything, because how often a layer is run goes with what is run.
        places: Host name and process id of every rank.

    Example:
        >>> Ranks().deal(["a", "b", "c"])
        [('a', True), ('b', True), ('c', True)]
        >>> Ranks(rank=1, size=2, lockstep=True).deal(["a", "b", "c"])
        [('b', True), ('a', False)]
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    lockstep: bool = False
    alike: bool = False
    places: tuple[tuple[str, int], ...] = ()

    @classmethod
    def meet(cls, device: torch.device, lockstep: bool = False) -> Ranks:
        """Return the ranks of the process group that this process is in; just this one if there is none."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        exchange = device if dist.get_backend() == "nccl" else torch.device("cpu")
        ranks = cls(dist.get_rank(), dist.get_world_size(), exchange, lockstep)
        places = ranks.gather((socket.gethostname(), os.getpid()))
        return replace(ranks, places=tuple((host, pid) for host, pid in places))

    @property
    def together(self) -> bool:
        """Whether there is more than one rank."""
        return self.size > 1

    @property
    def leads(self) -> bool:
        """Whether this rank is the leader."""
        return self.rank == 0

    # ---- dealing out --------------------------------------------------------------------------------------------

    def deal(self, items: Sequence[T]) -> list[tuple[T, bool]]:
        """Return this rank's share of the items, each with whether it counts.

        In lockstep all ranks get equally many: what fills a short share up is run like the rest and does not count.
        """
        if self.alike:
            return [(item, self.leads) for item in items]
        share = [(item, True) for item in items[self.rank :: self.size]]
        if self.lockstep and items:
            share += [(items[0], False)] * (-(-len(items) // self.size) - len(share))
        return share

    def sum_(self, *tensors: Tensor) -> None:
        """Add up each tensor over all ranks, in place; afterwards all have the same bits."""
        for tensor in tensors if self.together else ():
            self._add_up(tensor, dist.all_reduce)

    def sum_at_leader_(self, tensor: Tensor) -> None:
        """Add a tensor up over all ranks into the leader's, in place; the others' is zero afterwards."""
        if self.together:
            self._add_up(tensor, partial(dist.reduce, dst=0))
            if not self.leads:
                tensor.zero_()

    def _add_up(self, tensor: Tensor, reduce: Callable[[Tensor], object]) -> None:
        moved = tensor.to(self.device).contiguous()  # memory is added up, not what a view shows of it
        with self._watched("adding up"):
            reduce(moved)
        if moved is not tensor:
            tensor.copy_(moved)

    # ---- agreeing -----------------------------------------------------------------------------------------------

    def same(self, tensor: Tensor) -> Tensor:
        """Return the leader's tensor; those of the others must have its shape and type."""
        if not self.together:
            return tensor
        moved = tensor.detach().to(self.device).contiguous()
        moved = moved.clone() if moved.data_ptr() == tensor.data_ptr() and not self.leads else moved
        with self._watched("telling"):
            dist.broadcast(moved, src=0)
        return tensor if self.leads else moved.to(tensor.device)

    def agree(self, value: T) -> T:
        """Return the leader's value: plain data, as JSON has it."""
        if not self.together:
            return value
        agreed: T = json.loads(self._tell(json.dumps(value).encode() if self.leads else b""))
        return agreed

    def lead(self, work: Callable[[], Payload], errors: Sequence[type[Exception]] = ()) -> Payload:
        """Let the leader do something and return what comes of it, plain data and tensors, on every rank.

        If it fails, some kinds of errors, made of a message alone, are raised on every rank as they are; others reach
        the rest of the ranks as :class:`RankError`.
        """
        if not self.together:
            return work()
        if self.leads:
            try:
                data, tensors = work()
                packed = _pack({"data": data}, tensors)
            except Exception as error:
                self._tell(_pack({"error": type(error).__name__, "message": str(error)}, {}))
                raise
            self._tell(packed)
            return data, tensors
        told, tensors = _unpack(self._tell(b""))
        if "error" not in told:
            return told["data"], tensors
        for kind in errors:
            if kind.__name__ == told["error"]:
                raise kind(told["message"])
        raise RankError(f"rank {self.rank} stops, for rank 0 has: {told['message']}")

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in order: plain data, as JSON has it."""
        if not self.together:
            return [value]
        data = json.dumps(value).encode()
        sizes = torch.zeros(self.size, dtype=torch.long)
        sizes[self.rank] = len(data)
        self.sum_(sizes)
        own = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        own[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        parts = [torch.empty_like(own, device=self.device) for _ in range(self.size)]
        with self._watched("gathering"):
            dist.all_gather(parts, own.to(self.device))
        return [json.loads(part[: int(size)].cpu().numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]

    def _tell(self, data: bytes) -> bytes:
        size = torch.tensor([len(data)], device=self.device)
        with self._watched("telling"):
            dist.broadcast(size, src=0)
            told = torch.empty(int(size), dtype=torch.uint8, device=self.device)
            if self.leads and data:
                told.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            if len(told):
                dist.broadcast(told, src=0)
        return data if self.leads else told.cpu().numpy().tobytes()

    # ---- failing ------------------------------------------------------------------------------------------------

    @contextmanager
    def _watched(self, what: str) -> Iterator[None]:
        """Name the rank that is gone when an exchange breaks off."""
        try:
            yield
        except RuntimeError as error:
            raise RankError(f"rank {self.rank} stops while {what}: {self._missing()} ({_line(error)})") from error

    def _missing(self) -> str:
        here, gone, patience = socket.gethostname(), [], 60
        while patience and not (gone := self._gone(here)):  # one that fails takes a moment to end
            patience -= 1
            time.sleep(0.1)
        if gone:
            return f"{' and '.join(gone)} has ended"
        others = ", ".join(f"rank {r} on {host}" for r, (host, _) in enumerate(self.places) if host != here)
        return f"another rank has stopped{f', one of {others}' if others else ''}"

    def _gone(self, here: str) -> list[str]:
        """Name the other ranks of this host that have ended."""
        return [
            f"rank {rank} (process {pid} on {host})"
            for rank, (host, pid) in enumerate(self.places)
            if host == here and rank != self.rank and not _lives(pid)
        ]


def _lives(pid: int) -> bool:
    """Tell whether a process of this host is running; one that is dead and not yet buried is not."""
    with suppress(OSError):
        os.kill(pid, 0)
        with suppress(OSError), open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
        return True
    return False


def _line(error: Exception) -> str:
    """Return the first sentence of an error, without where in torch's sources it was raised."""
    text = re.sub(r"^\[\S+\]\s*", "", str(error).strip().partition("\n")[0])
    return text.partition(". ")[0][:200]


def _pack(data: Any, tensors: Mapping[str, Tensor]) -> bytes:
    ready = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    return safetensors.torch.save(ready, metadata={"data": json.dumps(data)})


def _unpack(data: bytes) -> tuple[Any, dict[str, Tensor]]:
    head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    tensors = {name: value.clone() for name, value in safetensors.torch.load(data).items()}
    return json.loads(head["__metadata__"]["data"]), tensors
