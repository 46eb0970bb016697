"""What ranks exchange and agree on, by real processes; and what one process does alone."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_edit.devices.ranks import RankError, Ranks, _lives
from lit_edit.errors import ArgumentError
from tests.ranks.together import Found, raised, together

SIZES = [2, 3]
ITEMS = list("abcdefg")
DTYPES = [
    torch.float32,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.bfloat16,
    torch.float16,
    torch.bool,
    torch.uint8,
]


# ---- dealing out, without a group ------------------------------------------------------------------------------------


def shares(items: list[str], size: int, **options: bool) -> list[list[tuple[str, bool]]]:
    return [Ranks(rank, size, **options).deal(items) for rank in range(size)]


@pytest.mark.parametrize(
    "options", [{}, {"lockstep": True}, {"alike": True}, {"lockstep": True, "alike": True}], ids=str
)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("count", range(8))
def test_each_item_counts_once(count: int, size: int, options: dict[str, bool]) -> None:
    dealt = shares(ITEMS[:count], size, **options)
    assert sorted(item for share in dealt for item, counts in share if counts) == ITEMS[:count]
    if options:
        assert len({len(share) for share in dealt}) == 1
    if not options:
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
        assert all(counts for share in dealt for _, counts in share)


def test_who_gets_what() -> None:
    assert shares(ITEMS[:3], 2) == [[("a", True), ("c", True)], [("b", True)]]
    assert shares(ITEMS[:3], 2, lockstep=True) == [[("a", True), ("c", True)], [("b", True), ("a", False)]]
    alike = [[(item, rank == 0) for item in ITEMS[:3]] for rank in range(2)]
    assert shares(ITEMS[:3], 2, alike=True) == shares(ITEMS[:3], 2, lockstep=True, alike=True) == alike
    assert shares(ITEMS[:1], 3, lockstep=True) == [[("a", True)], [("a", False)], [("a", False)]]


def test_one_process_works_alone() -> None:
    ranks, tensor = Ranks(), torch.tensor([1.5, 2.5])
    assert Ranks.meet(torch.device("cpu"), lockstep=True) == ranks == Ranks.meet(torch.device("meta"))
    assert (ranks.leads, ranks.together, ranks.size, ranks.lockstep) == (True, False, 1, False)
    ranks.sum_(tensor)
    ranks.sum_at_leader_(tensor)
    assert tensor.tolist() == [1.5, 2.5]
    assert ranks.same(tensor) is tensor
    value = {"not": {"plain", "data"}}
    assert ranks.agree(value) is value
    assert ranks.gather(value) == [value]
    assert ranks.lead(lambda: (value, {"t": tensor})) == (value, {"t": tensor})
    with pytest.raises(ZeroDivisionError):
        ranks.lead(lambda: (1 / 0, {}))


def test_processes_that_live_and_those_that_do_not() -> None:
    assert _lives(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert _lives(child.pid)
    child.kill()
    deadline = time.monotonic() + 10
    while _lives(child.pid) and time.monotonic() < deadline:  # nobody has buried it yet
        time.sleep(0.01)
    os.kill(child.pid, 0)  # its number is still taken
    assert not _lives(child.pid)
    child.communicate()
    assert not _lives(child.pid)


# ---- exchanging ------------------------------------------------------------------------------------------------------


def draw(rank: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def exchange(ranks: Ranks) -> Found:
    found: Found = {"places": ranks.places, "leads": ranks.leads, "together": ranks.together, "pid": os.getpid()}
    for dtype in (torch.float32, torch.float64, torch.int64):
        plain = (100 * draw(ranks.rank, 5, 3)).to(dtype)
        ranks.sum_(plain)
        at_leader = (100 * draw(ranks.rank, 5, 3)).to(dtype)
        ranks.sum_at_leader_(at_leader)
        found |= {f"sum {dtype}": plain, f"leader {dtype}": at_leader}
    turned, cut, empty = draw(ranks.rank, 4, 6).T, draw(ranks.rank, 4, 6)[:, 1::2], torch.zeros(0)
    one = torch.tensor(1.0 + ranks.rank)
    storages = turned.data_ptr(), cut.data_ptr(), one.data_ptr()
    ranks.sum_(turned, cut, empty, one)
    ranks.sum_()
    assert storages == (turned.data_ptr(), cut.data_ptr(), one.data_ptr())  # in place
    found |= {"turned": turned, "cut": cut, "one": one, "empty": empty}
    turned, cut = draw(ranks.rank, 4, 6).T, draw(ranks.rank, 4, 6)[:, 1::2]
    ranks.sum_at_leader_(turned)
    ranks.sum_at_leader_(cut)
    return found | {"turned leader": turned, "cut leader": cut}


@pytest.fixture(scope="module", params=SIZES)
def exchanged(request: pytest.FixtureRequest) -> list[Found]:
    return together(request.param, exchange)


def test_sums(exchanged: list[Found]) -> None:
    everyone, size = exchanged, len(exchanged)
    for dtype in (torch.float32, torch.float64, torch.int64):
        expected = torch.stack([(100 * draw(rank, 5, 3)).to(dtype) for rank in range(size)]).sum(0)
        for rank, found in enumerate(everyone):
            torch.testing.assert_close(found[f"sum {dtype}"], expected)
            assert torch.equal(found[f"sum {dtype}"], everyone[0][f"sum {dtype}"])
            torch.testing.assert_close(found[f"leader {dtype}"], expected if rank == 0 else torch.zeros_like(expected))
    whole = sum(draw(rank, 4, 6) for rank in range(size))
    for rank, found in enumerate(everyone):
        torch.testing.assert_close(found["turned"], whole.T)
        torch.testing.assert_close(found["cut"], whole[:, 1::2])
        torch.testing.assert_close(found["turned leader"], whole.T if rank == 0 else torch.zeros(6, 4).double())
        torch.testing.assert_close(found["cut leader"], whole[:, 1::2] if rank == 0 else torch.zeros(4, 3).double())
        assert found["one"].item() == size * (size + 1) / 2
        assert found["empty"].shape == (0,)


def test_meeting(exchanged: list[Found]) -> None:
    pids = [found["pid"] for found in exchanged]
    assert len(set(pids)) == len(exchanged)
    for rank, found in enumerate(exchanged):
        assert found["places"] == [[socket.gethostname(), pid] for pid in pids]
        assert (found["leads"], found["together"]) == (rank == 0, True)


def values_of(rank: int) -> list[Any]:
    return [
        rank,
        "",
        "Zürich 日本" * rank,
        None,
        [],
        {"a": [1.5, True, {"b": rank}]},
        ["x" * 1000] * rank,
        [0.1 + rank],
    ]


def agreeing(ranks: Ranks) -> Found:
    found: Found = {"agreed": [ranks.agree(value) for value in values_of(ranks.rank)]}
    found["gathered"] = [ranks.gather(value) for value in values_of(ranks.rank)]
    for dtype in DTYPES:
        own = (10 * draw(ranks.rank, 3, 4)).to(dtype)
        before = own.clone()
        told = ranks.same(own)
        assert torch.equal(own, before)
        assert ranks.leads == (told is own)
        assert ranks.leads or told.data_ptr() != own.data_ptr()
        found[f"same {dtype}"] = told
    for name, own in {
        "turned": draw(ranks.rank, 3, 4).T,
        "cut": draw(ranks.rank, 6, 8)[::2, 1::3],
        "part": draw(ranks.rank, 40)[3:9],
        "empty": draw(ranks.rank, 0, 4),
        "with gradient": draw(ranks.rank, 3).requires_grad_(),
    }.items():
        before = own.detach().clone()
        found[name] = ranks.same(own)
        assert torch.equal(own.detach(), before), name
    return found


@pytest.mark.parametrize("size", SIZES)
def test_agreeing_and_gathering(size: int) -> None:
    everyone = together(size, agreeing)
    lead = {
        "turned": draw(0, 3, 4).T,
        "cut": draw(0, 6, 8)[::2, 1::3],
        "part": draw(0, 40)[3:9],
        "empty": draw(0, 0, 4),
        "with gradient": draw(0, 3),
    }
    for found in everyone:
        assert found["agreed"] == values_of(0)
        assert found["gathered"] == [list(values) for values in zip(*map(values_of, range(size)), strict=True)]
        for dtype in DTYPES:
            told, expected = found[f"same {dtype}"], (10 * draw(0, 3, 4)).to(dtype)
            assert told.dtype == dtype
            assert torch.equal(told, expected)
        for name, expected in lead.items():
            assert torch.equal(found[name], expected), name


# ---- the leader does it ----------------------------------------------------------------------------------------------

TENSORS: dict[str, Tensor] = {str(dtype): (10 * draw(0, 3, 5)).to(dtype) for dtype in DTYPES}
TENSORS |= {"empty": torch.zeros(0, 7), "scalar": torch.tensor(0.1), "turned": draw(1, 3, 5).T, "cut": draw(1, 9)[1::2]}


class DiskError(RuntimeError):
    """An error that is not known to the others."""


def leading(ranks: Ranks) -> Found:
    calls: list[int] = []
    found: Found = {}

    def work() -> tuple[Any, dict[str, Tensor]]:
        calls.append(ranks.rank)
        return {"numbers": [1, 0.1, None], "nothing": float("inf")}, TENSORS

    def failing(error: Exception) -> Callable[[], Any]:
        def fail() -> Any:
            raise error

        return fail

    data, tensors = ranks.lead(work)
    found |= tensors | {"data": data, "shapes": {name: list(value.shape) for name, value in tensors.items()}}
    found["nothing"] = list(ranks.lead(lambda: (None, {}))[1])
    known = failing(ArgumentError("a setting ‘x’ is wrong"))
    unknown = failing(DiskError("the disk is full"))
    found["known"] = raised(lambda: ranks.lead(known, (KeyError, ArgumentError)))
    found["unknown"] = raised(lambda: ranks.lead(unknown, (ArgumentError,)))
    found["own"] = raised(lambda: ranks.lead(lambda: 1 / 0, (ZeroDivisionError,)))
    found["none known"] = raised(lambda: ranks.lead(known))
    found["no JSON"] = raised(lambda: ranks.lead(lambda: ({1, 2}, {})))  # must not leave the others waiting
    # And all of them can go on.
    found["after"] = [ranks.lead(lambda: (7, {}))[0], ranks.gather(ranks.rank), ranks.agree(ranks.rank)]
    return found | {"calls": calls}


@pytest.fixture(scope="module", params=SIZES)
def led(request: pytest.FixtureRequest) -> list[Found]:
    return together(request.param, leading)


def test_leading(led: list[Found]) -> None:
    for rank, found in enumerate(led):
        assert found["data"] == {"numbers": [1, 0.1, None], "nothing": float("inf")}
        for name, expected in TENSORS.items():
            assert found[name].dtype == expected.dtype, name
            assert found["shapes"][name] == list(expected.shape), name
            assert torch.equal(found[name], expected), name
        assert found["nothing"] == []
        assert found["calls"] == ([0] if rank == 0 else [])
        assert found["after"] == [7, list(range(len(led))), 0]


def test_a_leader_that_fails(led: list[Found]) -> None:
    for rank, found in enumerate(led):
        assert found["known"] == ["ArgumentError", "a setting ‘x’ is wrong"]
        assert found["own"] == ["ZeroDivisionError", "division by zero"]
        stops = f"rank {rank} stops, for rank 0 has: "
        unknown, none_known = ["DiskError", "the disk is full"], ["ArgumentError", "a setting ‘x’ is wrong"]
        assert found["unknown"] == (unknown if rank == 0 else ["RankError", stops + unknown[1]])
        assert found["none known"] == (none_known if rank == 0 else ["RankError", stops + none_known[1]])


def test_what_the_leader_cannot_tell_fails_on_all(led: list[Found]) -> None:
    for rank, found in enumerate(led):
        assert found["no JSON"][0] == ("TypeError" if rank == 0 else "RankError")


# ---- a rank that is gone ---------------------------------------------------------------------------------------------


def losing_one(ranks: Ranks, gone: int, what: str) -> Found:
    ranks.gather(None)
    if ranks.rank == gone:
        os._exit(9)
    exchanges = {
        "sum": lambda: ranks.sum_(torch.ones(3)),
        "gather": lambda: ranks.gather(ranks.rank),
        "lead": lambda: [ranks.lead(lambda: (None, {})) and ranks.gather(1) for _ in range(2)],
    }
    start = time.monotonic()
    kind, message = raised(exchanges[what])
    return {"error": [kind, message], "seconds": time.monotonic() - start, "places": ranks.places}


@pytest.mark.parametrize(("size", "gone", "what"), [(2, 1, "gather"), (2, 0, "lead"), (3, 2, "sum"), (3, 0, "sum")])
def test_the_others_name_the_one_that_is_gone(size: int, gone: int, what: str) -> None:
    others = [rank for rank in range(size) if rank != gone]
    everyone = dict(zip(others, together(size, losing_one, gone, what, gone=[gone]), strict=True))
    named = []
    for rank, found in everyone.items():
        host, pid = found["places"][gone]
        kind, message = found["error"]
        assert kind == RankError.__name__
        assert found["seconds"] < 10
        assert re.match(rf"rank {rank} stops while (adding up|gathering|telling): ", message)
        named.append(f"rank {gone} (process {pid} on {host})" in message)
    assert any(named)
    assert all(named) or size > 2
