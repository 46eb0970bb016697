"""Grouping by length, against all groupings of few rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_edit.text.buckets import partition_by_length

quick = settings(max_examples=80, deadline=None, database=None)


def cost(groups: list[list[int]], lengths: list[int], overhead: int) -> int:
    return sum(len(group) * max(lengths[i] for i in group) + overhead for group in groups)


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """All set partitions."""
    if not items:
        yield []
        return
    head, *rest = items
    for smaller in partitions(rest):
        yield [[head], *smaller]
        for index, group in enumerate(smaller):
            yield [*smaller[:index], [head, *group], *smaller[index + 1 :]]


@quick
@given(st.lists(st.integers(0, 500), max_size=60), st.integers(0, 1000))
def test_groups_are_a_permutation_in_order_of_length(lengths: list[int], overhead: int) -> None:
    groups = partition_by_length(lengths, overhead)
    flat = [row for group in groups for row in group]
    assert sorted(flat) == list(range(len(lengths)))
    assert all(groups)
    assert [lengths[row] for row in flat] == sorted(lengths)


@quick
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 60))
def test_no_grouping_is_cheaper(lengths: list[int], overhead: int) -> None:
    best = min(cost(groups, lengths, overhead) for groups in partitions(list(range(len(lengths)))))
    assert cost(partition_by_length(lengths, overhead), lengths, overhead) == best


@quick
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_result_depends_on_nothing_else(lengths: list[int]) -> None:
    assert partition_by_length(lengths) == partition_by_length(list(lengths))


@pytest.mark.parametrize(
    ("lengths", "overhead", "expected"),
    [
        ([], 40, []),
        ([7], 40, [[0]]),
        ([1, 100], 0, [[0], [1]]),
        ([1, 100], 10**6, [[0, 1]]),
        ([5, 5, 5], 0, [[0, 1, 2]]),
    ],
)
def test_by_hand(lengths: list[int], overhead: int, expected: list[list[int]]) -> None:
    assert partition_by_length(lengths, overhead) == expected
