"""Which few elements of a set do most: greedy search over a set function. Knows a callable and
candidate numbers only.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One element taken: which, the value of the set with it, and how many evaluations it took from
    the beginning.
    """

    chosen: int
    value: float
    evaluations: int


def lazy_greedy(
    value: Callable[[list[int]], float],
    candidates: Sequence[int],
    target: float = math.inf,
    max_evaluations: int | None = None,
) -> list[Step]:
    """Take the candidate with the largest gain, again and again, until the set's value reaches
    ``target``.

    Gains of earlier steps wait in a priority queue and are renewed only at its top (Minoux 1978).
    For a submodular ``value`` the path is that of plain greedy search; otherwise a candidate whose
    gain has grown meanwhile can be overlooked, so the path shows that a set suffices, not that none
    smaller does. Ends early when no gain is positive or ``max_evaluations`` are spent; a step is
    never taken on a stale gain.
    """
    path: list[Step] = []
    chosen: list[int] = []
    current, evaluations = value([]), 1
    queue = [
        (-math.inf, order, candidate, -1) for order, candidate in enumerate(candidates)
    ]  # -gain, tie, which, when
    while queue and current < target:
        negative_gain, order, candidate, renewed = heapq.heappop(queue)
        if renewed < len(path):
            if evaluations == max_evaluations:
                break
            evaluations += 1
            gain = value([*chosen, candidate]) - current
            heapq.heappush(queue, (-gain, order, candidate, len(path)))
        elif negative_gain >= 0:
            break
        else:
            current -= negative_gain
            chosen.append(candidate)
            path.append(Step(candidate, current, evaluations))
    return path


def size_for(path: Sequence[Step], target: float) -> int | None:
    """How many steps reach ``target``; None where the path ends before."""
    return next((n for n, step in enumerate(path, 1) if step.value >= target), None)
