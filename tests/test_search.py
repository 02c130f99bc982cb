"""Lazy greedy search against greedy search that evaluates every candidate at every step."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssah_utils.search import Step, lazy_greedy, size_for


def coverage(areas: list[set[int]]):
    """How much is covered: submodular. Counts its calls."""

    def value(chosen: list[int]) -> float:
        value.calls.append(list(chosen))
        return float(len(set().union(*(areas[which] for which in chosen))))

    value.calls = []
    return value


def plain_greedy(value, candidates: list[int], target: float) -> list[tuple[int, float]]:
    chosen, path, current = [], [], value([])
    while current < target:
        gains = {
            which: value([*chosen, which]) - current for which in candidates if which not in chosen
        }
        if not gains or max(gains.values()) <= 0:
            break
        best = max(gains, key=lambda which: (gains[which], -candidates.index(which)))
        chosen.append(best)
        current += gains[best]
        path.append((best, current))
    return path


areas = st.lists(st.sets(st.integers(0, 30), max_size=8), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(areas=areas, target=st.one_of(st.integers(0, 30), st.just(math.inf)), seed=st.randoms())
def test_path_is_that_of_plain_greedy_on_a_submodular_function(areas, target, seed):
    candidates = list(range(len(areas)))
    seed.shuffle(candidates)
    found = lazy_greedy(value := coverage(areas), candidates, target)
    expected = plain_greedy(coverage(areas), candidates, target)
    assert [step.value for step in found] == [value for _, value in expected]
    assert len({step.chosen for step in found}) == len(found)
    for n, step in enumerate(found, 1):
        assert step.value == coverage(areas)([taken.chosen for taken in found[:n]])
    assert all(step.evaluations <= len(value.calls) for step in found)


def test_ties_go_to_the_candidate_that_comes_first():
    assert [step.chosen for step in lazy_greedy(coverage([{1}, {2}, {3}]), [2, 0, 1])] == [2, 0, 1]


def test_it_saves_evaluations():
    disjoint = [set(range(100 * n, 100 * n + 50 - n)) for n in range(30)]
    value = coverage(disjoint)
    assert [step.chosen for step in lazy_greedy(value, range(30))] == list(range(30))
    assert len(value.calls) == 1 + 30 + 29, (
        "the empty set, everything once, then one renewal per step"
    )


def test_it_ends_at_the_target_without_gain_and_out_of_evaluations():
    areas = [{1, 2, 3}, {3, 4}, {5}, {1}]
    assert [step.chosen for step in lazy_greedy(coverage(areas), range(4), target=4)] == [0, 1]
    assert [step.chosen for step in lazy_greedy(coverage(areas), range(4))] == [0, 1, 2]
    value = coverage(areas)
    assert lazy_greedy(value, range(4), max_evaluations=5) == [Step(0, 3.0, 5)]
    assert len(value.calls) == 5
    assert lazy_greedy(coverage(areas), range(4), max_evaluations=3) == []
    assert lazy_greedy(coverage(areas), range(4), target=0) == []
    assert lazy_greedy(coverage(areas), []) == []


def test_size_for_a_target():
    path = [Step(3, 1.0, 5), Step(1, 2.5, 6)]
    assert [size_for(path, target) for target in (0.5, 1.0, 1.1, 2.5, 2.6)] == [1, 1, 2, 2, None]
    assert size_for([], 1.0) is None


def test_a_value_of_nan_is_no_gain():
    values = {(): 0.0, (0,): math.nan, (1,): 2.0, (2,): 1.0, (1, 2): 3.0}

    def value(chosen: list[int]) -> float:
        return values.get(tuple(chosen), math.nan)

    assert [step.chosen for step in lazy_greedy(value, [0, 1, 2])] == [1, 2]


@pytest.mark.parametrize("negative", [-1.0, 0.0])
def test_nothing_is_taken_that_does_not_gain(negative):
    assert lazy_greedy(lambda chosen: negative * len(chosen), range(3)) == []
