"""The largest resolution that fits a budget of bits."""

from __future__ import annotations

from collections.abc import Callable


def largest_within(cost: Callable[[int], float], budget: float, most: int) -> int:
    """The largest ``q`` in ``[1, most]`` with ``cost(q) <= budget``; 0 if there is none.

    Args:
        cost: Non-decreasing on ``[1, most]``.
        budget: What ``q`` may cost.
        most: Upper end of the search.

    Returns:
        ``q``, found by bisection.
    """
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if cost(middle) <= budget:
            low = middle
        else:
            high = middle - 1
    return low
