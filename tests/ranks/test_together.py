"""The helper itself: a rank that fails, ends or hangs must fail the test, and leave no process behind."""

from __future__ import annotations

import os
import time
from contextlib import suppress

import pytest
import torch

from lit_edit.devices.ranks import Ranks
from tests.ranks.together import RankFailedError, together


def tell(ranks: Ranks, name: str) -> dict[str, object]:
    return {"name": name, "rank": ranks.rank, "size": ranks.size, "tensor": torch.full((2, 2), ranks.rank).T}


def fail_second(ranks: Ranks) -> None:
    if ranks.rank == 1:
        raise LookupError("this one first")
    with suppress(RuntimeError):
        ranks.agree(None)
    ranks.agree(None)


def end_second(ranks: Ranks) -> None:
    if ranks.rank == 1:
        os._exit(3)


def hang_second(ranks: Ranks, path: str) -> None:
    with open(f"{path}/{ranks.rank}", "w") as file:
        file.write(str(os.getpid()))
    if ranks.rank == 1:
        time.sleep(100)
    ranks.agree(None)
    ranks.gather(None)


@pytest.mark.parametrize("size", [1, 3])
def test_every_rank_answers(size: int) -> None:
    found = together(size, tell, "a name")
    assert [(f["name"], f["rank"], f["size"]) for f in found] == [("a name", rank, size) for rank in range(size)]
    assert all(torch.equal(f["tensor"], torch.full((2, 2), rank)) for rank, f in enumerate(found))


def test_the_first_to_fail_is_the_one_that_is_told() -> None:
    with pytest.raises(RankFailedError, match=r"(?s)rank 1 of 2 failed:.*in fail_second.*LookupError: this one first"):
        together(2, fail_second)


def test_one_that_ends_without_a_word_is_a_failure() -> None:
    with pytest.raises(RankFailedError, match="rank 1 of 2 ended with exit code 3"):
        together(2, end_second)
    assert together(2, end_second, gone=[1]) == [{}]
    with pytest.raises(RankFailedError, match="rank 0 of 1 ended with exit code 0"):
        together(1, end_second, gone=[0])


def test_a_hang_ends_and_says_where(tmp_path: object) -> None:
    start = time.monotonic()
    with pytest.raises(RankFailedError, match=r"rank 1 hung:(?s:.*)in hang_second"):
        together(2, hang_second, str(tmp_path), limit=2)
    assert time.monotonic() - start < 20
    for rank in range(2):
        with open(f"{tmp_path}/{rank}") as file:
            pid = int(file.read())
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
