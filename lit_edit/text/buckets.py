"""Grouping rows by length, so that little padding is computed."""

from __future__ import annotations

from collections.abc import Sequence


def partition_by_length(lengths: Sequence[int], overhead: int = 40) -> list[list[int]]:
    """Split rows into groups to be padded to their longest, at the least cost: row indices, shortest rows first.

    The cost of a group is ``rows * longest + overhead``; the overhead is what one more pass costs, in tokens (reading
    the weights once more takes about as long as computing forty tokens). Solved exactly over the sorted lengths.

    Example:
        >>> partition_by_length([2, 9, 2, 9], overhead=1)
        [[0, 2], [1, 3]]
        >>> partition_by_length([2, 3, 2], overhead=16)
        [[0, 2, 1]]
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    distinct = [i for i in range(1, len(order) + 1) if i == len(order) or lengths[order[i]] != lengths[order[i - 1]]]
    best: dict[int, tuple[int, int]] = {0: (0, 0)}  # rows taken -> (cost, where the last group begins)
    for end in distinct:
        longest = lengths[order[end - 1]]
        starts = [0, *(d for d in distinct if d < end)]
        best[end] = min((best[s][0] + (end - s) * longest + overhead, s) for s in starts)
    groups: list[list[int]] = []
    end = len(order)
    while end > 0:
        start = best[end][1]
        groups.append(order[start:end])
        end = start
    return groups[::-1]
