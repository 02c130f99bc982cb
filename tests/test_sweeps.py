"""A sweep freezes nested sets, and compares each with its control and with freezing nothing."""

import numpy as np
import pytest
import torch

from ssah_utils.experiments import sweeps
from ssah_utils.experiments.frontier import LossPath
from ssah_utils.per_unit import PerUnit


def test_sets_are_nothing_nested_ones_and_random_ones_of_the_same_size():
    order = PerUnit(
        {"attention": -torch.arange(6.0).view(2, 3), "mlp": -torch.arange(6.0, 20).view(2, 7)}
    )
    sets = sweeps.sweep_sets(order, [0.1, 0.5, 1.0], torch.Generator().manual_seed(0))
    assert list(sets) == [
        ("safety first", 0.0),
        ("safety first", 0.1),
        ("safety first", 0.5),
        ("safety first", 1.0),
        ("random", 0.1),
        ("random", 0.5),
    ]
    assert sets["safety first", 0.0] is None and sets["safety first", 1.0].all()
    assert sets["safety first", 0.1].names() == ["attention/0/0", "attention/0/1"]
    for fraction in (0.1, 0.5):
        chosen, control = sets["safety first", fraction], sets["random", fraction]
        for kind in order:
            assert chosen[kind].sum(1).tolist() == control[kind].sum(1).tolist()


def test_gains_are_read_at_the_loss_that_the_set_its_control_and_nothing_reach():
    """By hand. At rate 1, the half sets reach 3: nothing kept 4, the set 6, random 5."""
    margins = lambda *values: np.array(values, dtype=float)[:, None].repeat(2, 1)  # noqa: E731
    paths = {
        ("safety first", 0.0, 1.0): LossPath([5, 1], margins(8, 0)),
        ("safety first", 0.5, 1.0): LossPath([5, 2], margins(8, 5)),
        ("random", 0.5, 1.0): LossPath([5, 3], margins(8, 5)),
        ("safety first", 1.0, 1.0): LossPath([5, 4], margins(8, 7)),
        ("safety first", 0.0, 3.0): LossPath([5, 2], margins(8, 2)),
        ("safety first", 0.5, 3.0): LossPath([5, 1], margins(8, 4)),
    }
    gains = sweeps.sweep_gains(paths).set_index(["order", "fraction", "factor"])
    assert set(gains.index) == set(paths)
    at = gains["task_loss"]
    assert at["safety first", 0.5, 1.0] == at["random", 0.5, 1.0] == 3
    assert at["safety first", 1.0, 1.0] == 4 and at["safety first", 0.5, 3.0] == 2
    expected = {
        ("safety first", 0.0, 1.0): 0,
        ("safety first", 0.5, 1.0): 6 - 4,
        ("random", 0.5, 1.0): 5 - 4,
        ("safety first", 1.0, 1.0): 7 - 6,
        ("safety first", 0.0, 3.0): 0,
        ("safety first", 0.5, 3.0): 5 - 2,
    }
    assert gains["gain"].to_dict() == pytest.approx(expected)
    assert {"low", "high", "p", "margin"} <= set(gains)


def test_a_frozen_set_is_a_point_of_the_sweep():
    chosen = PerUnit({"attention": torch.arange(6).view(2, 3) < 2, "mlp": torch.zeros(2, 7) > 0})
    assert sweeps.point_of("safety", chosen) == ("safety first", 0.1)
    assert sweeps.point_of("random_as_safety_some_complex", chosen) == ("random", 0.1)
    assert sweeps.point_of("nothing", None) == ("safety first", 0.0)
