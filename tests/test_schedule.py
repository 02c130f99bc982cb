"""What is said of jobs that need one another, against what a plain look at all of them finds."""

import itertools
import random

import numpy as np
import pytest

from ssah_utils.pipeline import schedule


def some_jobs(seed: int) -> tuple[dict[str, tuple[str, ...]], dict[str, float]]:
    """Up to nine jobs, each of which needs some of those before it."""
    draw = random.Random(seed)
    names = [f"job {k}" for k in range(draw.randint(1, 9))]
    needs = {
        name: tuple(one for one in names[:k] if draw.random() < draw.choice([0.1, 0.5, 0.9]))
        for k, name in enumerate(names)
    }
    return needs, {name: draw.uniform(0.1, 9) for name in names}


def reaches(needs: dict[str, tuple[str, ...]]) -> np.ndarray:
    """Whether the one job has to be done before the other, over any number of steps."""
    names = list(needs)
    steps = np.array([[one in needs[other] for other in names] for one in names], dtype=float)
    paths = sum(np.linalg.matrix_power(steps, n) for n in range(1, len(names) + 1))
    return paths > 0


def longest_from(name: str, needs, seconds) -> float:
    after = [longest_from(one, needs, seconds) for one in needs if name in needs[one]]
    return seconds[name] + max(after, default=0)


@pytest.mark.parametrize("seed", range(40))
def test_jobs_are_urgent_and_alone_as_paths_say(seed):
    needs, seconds = some_jobs(seed)
    expected = {name: longest_from(name, needs, seconds) for name in needs}
    assert schedule.urgency(needs, seconds) == pytest.approx(expected)
    one_way = reaches(needs)
    free = ~(one_way | one_way.T | np.eye(len(needs), dtype=bool))
    assert schedule.alone(needs) == {
        name for name, row in zip(needs, free, strict=True) if not row.any()
    }


@pytest.mark.parametrize(("seed", "at_a_time"), itertools.product(range(40), [1, 2, 3, 20]))
def test_the_end_is_where_no_faster_way_could_be(seed, at_a_time):
    needs, seconds = some_jobs(seed)
    left = schedule.seconds_left(needs, seconds, {}, set(), at_a_time)
    chain, total = max(schedule.urgency(needs, seconds).values()), sum(seconds.values())
    assert left >= max(chain, total / at_a_time) - 1e-9
    assert left <= total / at_a_time + chain * (1 - 1 / at_a_time) + 1e-9, "Graham's bound"
    if at_a_time == 1:
        assert left == pytest.approx(total)
    if at_a_time == 20:
        assert left == pytest.approx(chain)


def test_what_runs_is_done_and_has_failed_counts():
    needs = {"a": (), "b": ("a",), "c": ("a",), "d": ("b", "c")}
    seconds = {"a": 5.0, "b": 10.0, "c": 4.0, "d": 1.0}
    left = schedule.seconds_left
    assert left(needs, seconds, {}, set(), 2) == 16
    assert left(needs, seconds, {"a": 3.0}, set(), 2) == 13
    assert left(needs, seconds, {"a": 7.0}, set(), 2) == 11, "longer than expected: it may end now"
    assert left(needs, seconds, {"b": 4.0}, {"a"}, 1) == 6 + 4 + 1, (
        "one is running, the other waits"
    )
    assert left(needs, seconds, {"c": 1.0}, {"a"}, 2, frozenset("b")) == 3, "d is never done"
    assert left(needs, seconds, {}, set(needs), 2) == 0 == left({}, {}, {}, set(), 2)
