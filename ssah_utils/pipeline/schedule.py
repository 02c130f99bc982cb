"""When jobs that need one another are done: what comes first, what is alone, how long is left.

Knows names, needs and seconds; starts nothing.
"""

import heapq
from collections.abc import Mapping
from itertools import count

Needs = Mapping[str, tuple[str, ...]]  # by a job's name the names of those it waits for


def urgency(needs: Needs, seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds from the start of each job to the end of the longest chain of jobs that begins with
    it: who starts the most urgent first ends early.
    """
    waiting: dict[str, list[str]] = {name: [] for name in needs}
    for name, before in needs.items():
        for one in before:
            waiting[one].append(name)
    found: dict[str, float] = {}

    def of(name: str) -> float:
        if name not in found:
            found[name] = seconds[name] + max(map(of, waiting[name]), default=0.0)
        return found[name]

    return {name: of(name) for name in needs}


def alone(needs: Needs) -> set[str]:
    """Jobs beside which no other can run: every other is to be done before, or waits for them."""
    before: dict[str, set[str]] = {}

    def of(name: str) -> set[str]:
        if name not in before:
            before[name] = set(needs[name]).union(*map(of, needs[name]))
        return before[name]

    n_after = dict.fromkeys(needs, 0)
    for name in needs:
        for one in of(name):
            n_after[one] += 1
    return {name for name in needs if len(of(name)) + n_after[name] == len(needs) - 1}


def seconds_left(
    needs: Needs,
    seconds: Mapping[str, float],
    running: Mapping[str, float],
    done: set[str],
    at_a_time: int,
    failed: frozenset[str] = frozenset(),
) -> float:
    """Seconds until all jobs have ended that can, the most urgent first, ``at_a_time`` of them.

    ``running``: seconds that these have taken so far. What waits for one that has ``failed`` is not
    done.
    """
    first = urgency(needs, seconds)
    order = count()  # of two that end together the first that was started
    ends = [(max(seconds[name] - taken, 0.0), next(order), name) for name, taken in running.items()]
    heapq.heapify(ends)
    done, now = set(done), 0.0
    todo = [name for name in needs if name not in done | failed | running.keys()]
    todo.sort(key=lambda name: -first[name])
    while True:
        for name in [one for one in todo if done.issuperset(needs[one])]:
            if len(ends) < at_a_time:
                heapq.heappush(ends, (now + seconds[name], next(order), name))
                todo.remove(name)
        if not ends:
            return now
        now, _, ended = heapq.heappop(ends)
        done.add(ended)
