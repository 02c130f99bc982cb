"""Which few elements of a set do most: greedy search over a set function.

It sees a callable and numbers that stand for the candidates.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One element taken.

    ``value``: of the set with it. ``evaluations``: how many values were asked for since the
    beginning.
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
    """Take the candidate with the largest gain, again and again, until the set is worth ``target``.

    Gains of earlier steps wait in a priority queue and are renewed only at its top (Minoux 1978).
    For a submodular ``value`` the path is that of plain greedy search. Otherwise a candidate whose
    gain has grown meanwhile can be overlooked: then the path shows that a set suffices, not that no
    smaller one does. Ends early when no gain is positive or ``max_evaluations`` are spent; no step
    is taken on an outdated gain, nor on a value of nan.

    >>> weights = {0: 1.0, 1: 5.0, 2: 3.0}
    >>> path = lazy_greedy(lambda chosen: sum(weights[i] for i in chosen), [0, 1, 2], target=7.0)
    >>> [(step.chosen, step.value) for step in path]
    [(1, 5.0), (2, 8.0)]
    """
    path: list[Step] = []
    chosen: list[int] = []
    current, evaluations = value([]), 1
    # (-gain, order in a tie, candidate, number of steps when the gain was computed)
    queue = [(-math.inf, order, candidate, -1) for order, candidate in enumerate(candidates)]
    while queue and current < target:
        negative_gain, order, candidate, renewed = heapq.heappop(queue)
        if renewed < len(path):
            if evaluations == max_evaluations:
                break
            evaluations += 1
            gain = value([*chosen, candidate]) - current
            gain = -math.inf if math.isnan(gain) else gain  # nan has no place in a queue
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
