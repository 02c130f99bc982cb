"""Margins at equal task loss are what a ruler finds on the drawn curves."""

import numpy as np
import pandas as pd
import pytest

from ssah_utils import stats
from ssah_utils.experiments import frontier
from ssah_utils.experiments.frontier import LossPath

# Loss 6 -> 4 -> 3; two requests. Halfway down the first stretch (5) the margins are halfway: 6, 3.
DOWN = LossPath([6, 4, 3], [[8, 4], [4, 2], [0, 1]])


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (5.0, [6, 3]),
        (5.5, [7, 3.5]),
        (4.0, [4, 2]),  # at a checkpoint
        (3.25, [1, 1.25]),
        (3.0, [0, 1]),
        (2.0, [0, 1]),  # never reached: the last
        (6.0, [8, 4]),  # there from the start
        (7.0, [8, 4]),
    ],
)
def test_between_checkpoints_the_margin_lies_on_a_straight_line(loss, expected):
    assert DOWN.margins_at(loss) == pytest.approx(expected)


def test_of_a_loss_that_rises_again_the_first_crossing_counts():
    path = LossPath([6, 4, 5, 3], [[8], [4], [20], [-10]])
    assert path.margins_at(4.5) == pytest.approx([5])
    assert path.margins_at(3.5) == pytest.approx([-2.5]), "crossed on the second way down, 5 to 3"
    assert path.lowest_loss == 3


def test_a_loss_that_only_rises_is_compared_at_the_start():
    path = LossPath([3, 4, 5], [[2], [1], [0]])
    assert path.lowest_loss == 4, "what training reached, not where it began"
    assert path.margins_at(4) == pytest.approx([2])
    assert path.margins_at(2) == pytest.approx([0])


def test_equal_losses_are_no_division_by_zero():
    path = LossPath([6, 6, 4, 4], [[8], [7], [3], [1]])
    with np.errstate(all="raise"):
        assert path.margins_at(4) == pytest.approx([3]), "the first of two checkpoints there"
        assert path.margins_at(5) == pytest.approx([5])
        assert path.margins_at(6) == pytest.approx([8])


def test_agrees_with_interpolation_by_numpy_where_the_loss_falls_throughout():
    rng = np.random.default_rng(0)
    losses = np.sort(rng.uniform(1, 6, 9))[::-1]
    margins = rng.normal(size=(9, 4))
    path = LossPath(losses, margins)
    for loss in rng.uniform(losses[-1], losses[0], 20):
        expected = [np.interp(loss, losses[::-1], one[::-1]) for one in margins.T]
        assert path.margins_at(loss) == pytest.approx(expected)


def test_the_common_loss_is_the_best_of_the_run_that_learned_least():
    paths = {
        "a": [LossPath([6, 4, 3], np.zeros((3, 1))), LossPath([6, 2, 5], np.zeros((3, 1)))],
        "b": [LossPath([6, 3.5, 4], np.zeros((3, 1))), LossPath([1, 3.25, 3.25], np.zeros((3, 1)))],
    }
    assert frontier.common_loss(paths) == 3.5, "the start is not what training reached"


def two_seeds() -> dict[str, list[LossPath]]:
    """At the common loss 4 (``slow`` reaches no lower): full keeps 4, 2 and 2, 0; slow 7, 6 and 5,
    4.
    """
    return {
        "full": [
            LossPath([6, 2], [[8, 4], [0, 0]]),
            LossPath([8, 4, 1], [[8, 4], [2, 0], [-9, -9]]),
        ],
        "slow": [LossPath([6, 4], [[8, 7], [7, 6]]), LossPath([5, 3], [[6, 5], [4, 3]])],
    }


def test_gains_are_those_computed_by_hand():
    table = frontier.at_equal_loss(two_seeds(), "full").set_index("condition")
    assert table["task_loss"].tolist() == [4, 4]
    assert table["margin"].tolist() == pytest.approx([(4 + 2 + 2 + 0) / 4, (7 + 6 + 5 + 4) / 4])
    slow = table.loc["slow"]
    assert slow["gain"] == pytest.approx((3 + 4 + 3 + 4) / 4)
    assert (slow["seed_low"], slow["seed_high"]) == pytest.approx((3.5, 3.5))
    full = table.loc["full"]
    assert full[["gain", "low", "high", "seed_low", "seed_high"]].tolist() == [0] * 5


def test_intervals_and_p_are_those_of_the_matrix_of_seeds_and_requests():
    table = frontier.at_equal_loss(two_seeds(), "full", seed=3).set_index("condition")
    gains = np.array([[3.0, 4.0], [3.0, 4.0]])
    mean, low, high = stats.hierarchical_interval(gains, 3)
    assert table.loc["slow", ["gain", "low", "high"]].tolist() == pytest.approx([mean, low, high])
    assert table.loc["slow", "p"] == stats.paired_difference(gains.mean(0), np.zeros(2), 3)["p"]


def test_seeds_that_disagree_are_shown_by_their_range():
    paths = {
        "full": [LossPath([6, 4], [[1, 1], [0, 0]])] * 2,
        "other": [LossPath([6, 4], [[1, 1], [1, 3]]), LossPath([6, 4], [[1, 1], [-1, -1]])],
    }
    row = frontier.at_equal_loss(paths, "full").iloc[1]
    assert (row["gain"], row["seed_low"], row["seed_high"]) == pytest.approx((0.5, -1, 2))


def test_what_cannot_be_compared_is_refused_in_one_line():
    with pytest.raises(ValueError, match="one entry per checkpoint"):
        LossPath([6, 4], [[1.0]])
    with pytest.raises(ValueError, match="one entry per checkpoint"):
        LossPath([6], [[1.0]])
    paths = two_seeds()
    with pytest.raises(ValueError, match=r"no runs of 'none' to compare with \(there: full, slow"):
        frontier.at_equal_loss(paths, "none")
    with pytest.raises(ValueError, match="only the same ones can be paired"):
        frontier.at_equal_loss(paths | {"slow": paths["slow"][:1]}, "full")


def by_task() -> dict[tuple[str, str, int], LossPath]:
    """Task a with both seeds of ``two_seeds`` and a set that learns least; task b with one seed."""
    paths = {}
    for name, of_condition in two_seeds().items():
        paths |= {("a", name, k): path for k, path in enumerate(of_condition)}
    for k in (0, 1):
        paths["a", "least", k] = LossPath([6, 5], [[8, 8], [8, 8 - k]])
    paths["b", "full", 0] = LossPath([6, 2], [[8, 4], [0, 0]])
    paths["b", "slow", 0] = LossPath([6, 4], [[8, 7], [7, 6]])
    return paths


def test_comparisons_have_a_loss_of_their_own_and_one_correction_for_all():
    compared = [("a", ["slow"]), ("b", ["slow", "least"]), ("a", ["least"])]
    table = frontier.equal_loss_table(by_task(), compared, "full")
    assert table[["task", "condition"]].to_numpy().tolist() == [
        ["a", "full"],
        ["a", "slow"],
        ["b", "full"],
        ["b", "slow"],
        ["a", "least"],
    ], "full once a task, and what was not run on b is not there"
    assert table["task_loss"].tolist() == [4, 4, 4, 4, 5]
    alone = frontier.at_equal_loss(two_seeds(), "full")
    for column in ("margin", "gain", "low", "high", "p"):
        assert table[column].tolist()[:2] == alone[column].tolist()
    assert table["p_holm"].tolist() == stats.holm(table["p"].tolist())


def test_every_pair_is_compared_at_the_loss_that_both_reach():
    fast = LossPath([6, 2], [[8, 8], [0, 0]])
    slow = LossPath([6, 4], [[8, 8], [7, 7]])
    adapter = LossPath([6, 3], [[8, 8], [5, 5]])
    table = frontier.pairwise({"lora": adapter}, {"fast": fast, "slow": slow})
    assert table[["method", "against"]].to_numpy().tolist() == [["lora", "fast"], ["lora", "slow"]]
    assert table["last_loss"].tolist() == [3, 3] and table["task_loss"].tolist() == [3, 4]
    assert table["gain"].tolist() == pytest.approx([5 - 2, 6 - 7]), "read with a ruler at 3 and 4"
    assert {"low", "high"} <= set(table)


def test_outcomes_stand_beside_the_random_set_of_their_size():
    names = ["nothing", "safety", "safety_some_complex", "safety_all_complex"]
    names += ["random_as_safety_some_complex", "random_as_safety_all_complex"]
    gains = [0.0, 1.0, 2.0, 3.0, 0.5, 0.7]
    equal = pd.DataFrame({"condition": names, "title": [name.upper() for name in names]})
    equal = equal.assign(gain=gains, low=equal.index - 9.0, high=9.0)
    steps = [{"condition": name, "step": step} for name in names for step in (0, 5, 5)]
    losses = [9.0, 2.0, 4.0, *([9.0, 3.0, 6.0] * 5)]  # mean of the last: 3.0, and 4.5
    rates = pd.DataFrame(
        [
            {"condition": name, "set": source, "metric": metric, "mean": mean}
            for name in names
            for source, metric, mean in (
                ("harmful", "asr", 0.25),
                ("harmful", "asr", 0.75),
                ("other_harmful", "asr", 0.125),
                ("harmful", "coherent_asr", 1.0),
                ("cloze", "accuracy", 1.0),
            )
        ]
    )
    table = frontier.outcome_table(equal, pd.DataFrame(steps).assign(task_loss=losses), rates)
    assert table["condition"].tolist() == names[1:4]
    assert table["title"].tolist() == [name.upper() for name in names[1:4]]
    assert table["gain"].tolist() == [1, 2, 3] and table["control"].tolist() == [0.5, 0.5, 0.7]
    assert table["low"].tolist() == [-8, -7, -6] and (table["high"] == 9).all()
    assert (table["asr_harmful"] == 0.5).all() and (table["asr_other_harmful"] == 0.125).all()
    assert (table["loss_ratio"] == 1.5).all() and "asr_cloze" not in table
