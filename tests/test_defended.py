"""Defences side by side: comparisons, the choice of two, and cards, on paths made by hand."""

import numpy as np
import pandas as pd
import pytest
import torch

from ssah_utils import frozen_sets
from ssah_utils.defences import Mixed, PulledToStart, SafetyVector, Together
from ssah_utils.experiments import defence_methods, defence_names, defended, frontier
from ssah_utils.experiments.defence_methods import Strengths, TrainingMethod
from ssah_utils.experiments.defence_names import SOME
from ssah_utils.experiments.defended import CRITERIA, KeptMargins
from ssah_utils.experiments.frontier import LossPath
from ssah_utils.frozen_sets import RANDOM
from ssah_utils.per_unit import PerUnit
from tests.conftest import tiny_model

STRENGTHS = Strengths(
    (0.03, 0.1), 0.3, 1.0, 10.0, 1.0, 0.25, 0.5, 0.5, 0.5, {"lora": 10.0, "prefix": 3.0}
)
REFUSALS, HARMLESS = ([{"input_ids": [one], "labels": [one]}] for one in (1, 2))


def sets() -> dict[str, PerUnit | None]:
    generator = torch.Generator().manual_seed(0)

    def drawn(share):
        sizes = {"attention": (5, 6), "mlp": (5, 8)}
        return (
            PerUnit({kind: torch.rand(size, generator=generator) for kind, size in sizes.items()})
            < share
        )

    return {"nothing": None, "safety": drawn(0.1), SOME: drawn(0.3), RANDOM + SOME: drawn(0.3)}


SETS = sets()


def known(unaligned=None) -> dict[str, TrainingMethod]:
    return defence_methods.methods(SETS, REFUSALS, HARMLESS, unaligned, STRENGTHS, "SOME")


def path(losses, last_margins) -> LossPath:
    """Two requests, margins falling on a straight line in steps from 8 to the last ones."""
    shares = np.linspace(0, 1, len(losses))
    return LossPath(losses, [8 + share * (np.array(last_margins) - 8) for share in shares])


def kept(losses, study, fresh, safe) -> KeptMargins:
    return KeptMargins(*(path(losses, (last, last + 0.5)) for last in (study, fresh, safe)))


# -------------------------------------------------------------------------------------- the methods


def test_middle_units_are_as_many_of_each_kind_around_the_middle():
    chosen = SETS[SOME]
    found = frozen_sets.middle_units(chosen)
    for kind, own in found.items():
        assert own.sum() == chosen[kind].sum()
        counts = own.sum(1)
        touched = counts.nonzero().flatten().tolist()
        assert touched == list(range(touched[0], touched[-1] + 1)), "contiguous blocks"
        assert (counts[touched] < own.shape[1]).sum() <= 1, "all but one of them whole"
        assert counts[2] == counts.max(), "around the middle one of five"


def test_every_method_has_a_control_that_is_a_method():
    found = known(tiny_model("llama"))
    mixed = {name for share in (0.03, 0.1) for name in defence_names.mixed_names(share)}
    assert set(found) <= set(defence_names.NAMED) | mixed
    for name, method in found.items():
        assert method.id == name and "{" not in method.title
        assert (method.control in found) == (name != "nothing")
    assert found[SOME].title == "frozen: SOME" and found["mixed_3"].title == "3% refusals mixed in"
    controls = {method.control for method in found.values()}
    only = {name for name, method in found.items() if method.is_only_control}
    assert only == {*defence_names.ONLY_CONTROLS, "mixed_harmless_3", "mixed_harmless_10"}
    assert only <= controls


def test_a_method_and_its_control_differ_in_the_idea_alone():
    found = known(tiny_model("llama"))
    assert found["pulled_random"].how["defence"] == PulledToStart(10.0, SETS[RANDOM + SOME])
    assert found["mixed_10"].how["defence"] == Mixed(0.1, REFUSALS)
    for share, control in ((0.03, "mixed_harmless_3"), (0.1, "mixed_harmless_10")):
        assert found[control].how["defence"] == Mixed(share, HARMLESS)
        assert found[control.replace("_harmless", "")].control == control
    vector, control = (found[name].how["defence"] for name in ("vector", "vector_random"))
    assert (vector.strength, vector.is_random) == (0.5, False) and control.is_random
    assert found["lora"].how == {"factor": 10.0, "adapter": "lora"}
    assert found["safe_lora"].how.keys() == {"factor", "adapter", "defence"}
    assert found["nothing"].how == {} and found["lower_rate"].how == {"factor": 0.3}


def test_without_an_unaligned_version_its_methods_are_left_out_and_no_other_name_is():
    found = known()
    assert not set(defence_names.NEED_UNALIGNED) & set(found)
    asked = ["vector", "pulled", "safety"]
    expected = ["nothing", "pulled", "lower_rate", "safety", RANDOM + SOME]
    assert defence_methods.with_controls(asked, found) == expected
    with pytest.raises(KeyError, match="no method 'pulld'"):
        defence_methods.with_controls(["pulld"], found)


def test_two_methods_together_do_both():
    found = known(tiny_model("llama"))
    both = defence_methods.trained_together(found[SOME], found["mixed_3"])
    assert both.how == {"frozen": SETS[SOME], "defence": Mixed(0.03, REFUSALS)}
    assert (both.id, both.control) == ("combination", SOME)
    both = defence_methods.trained_together(found["vector"], found["mixed_3"])
    first, second = both.how["defence"].parts
    assert isinstance(both.how["defence"], Together) and isinstance(first, SafetyVector)
    assert second == Mixed(0.03, REFUSALS)


# --------------------------------------------------------------------------------------- comparison


def test_rate_and_stop_are_chosen_by_the_task_loss_whatever_the_margins():
    losses = {0.3: [6, 5, 4.5], 1.0: [6, 4, 4.2], 3.0: [6, 4.1, 9]}
    for margins in ([0, 0], [9, 9], [-9, 9]):
        paths = {factor: path(one, margins) for factor, one in losses.items()}
        assert defended.chosen_by_task_loss(paths) == (1.0, 1)
    assert defended.chosen_by_task_loss({1.0: path([2, 5, 4], [0, 0])}) == (1.0, 2), (
        "not before training"
    )


def test_a_stopped_training_ends_at_its_checkpoint():
    whole = kept([6, 4, 3], 2, 1, 0)
    stopped = whole.until(1)
    for name in ("study", "fresh", "safe"):
        found, expected = getattr(stopped, name), getattr(whole, name)
        np.testing.assert_array_equal(found.losses, expected.losses[:2])
        np.testing.assert_array_equal(found.margins, expected.margins[:2])


def runs() -> dict[tuple[str, str, int], KeptMargins]:
    """Full fine-tuning ends at loss 4; the other two at 4 and, having learned half, at 5."""
    return {
        ("a", "nothing", 0): kept([6, 4], 0, 0, 0),
        ("a", SOME, 0): kept([6, 4], 2, 1, 0.5),
        ("a", RANDOM + SOME, 0): kept([6, 5], 6, 6, 6),
        ("a", "pulled", 0): kept([6, 4], 0.5, -1, 3),
        ("b", "nothing", 0): kept([2, 1], 0, 0, 0),
        ("b", SOME, 0): kept([2, 1], 1, 1, 1),
    }


def test_gains_are_read_at_the_loss_that_both_reach():
    table = defended.gain_table(runs(), known()).set_index(["task", "method"])
    assert "nothing" not in table.index.get_level_values("method")
    ours = table.loc["a", SOME]
    assert (ours["gain"], ours["fresh_gain"], ours["safe_gain"]) == pytest.approx((2, 1, 0.5))
    assert ours["task_loss"] == 4 and ours["learned"] == 1 and ours["n_seeds"] == 1
    # halfway, at loss 5, full fine-tuning has 4 and 4.25, ours 5 and 5.25, the control 6 and 6.5
    control = table.loc["a", RANDOM + SOME]
    assert (control["task_loss"], control["gain"]) == pytest.approx((5, 2.125))
    assert control["learned"] == 0.5 and control["is_control"] and not ours["is_control"]
    assert ours["over_gain"] == pytest.approx(-1.125)
    assert np.isnan(table.loc["b", SOME]["over_gain"]), "the control was not run there"
    full = frontier.at_equal_loss(
        {name: [runs()["a", name, 0].study] for name in (SOME, "nothing")}, "nothing"
    ).set_index("condition")
    for column in ("gain", "low", "high"):
        assert ours[column] == full.loc[SOME, column]


def test_where_full_fine_tuning_has_not_learned_nobody_can_be_said_to():
    risen = {("a", name, 0): kept([2, 3], 0, 0, 0) for name in ("nothing", SOME)}
    assert np.isnan(defended.learned_share(risen, "a", SOME))


def test_only_repetitions_of_both_are_compared():
    more = runs() | {("a", "nothing", 1): kept([6, 1], -9, -9, -9)}
    assert defended.compared(more, "a", SOME, "nothing") == defended.compared(
        runs(), "a", SOME, "nothing"
    )


def test_duels_that_were_not_run_are_left_out():
    pairs = [("one", SOME, "pulled"), ("other", SOME, "vector")]
    table = defended.duel_table(runs(), "a", pairs)
    assert table["duel"].tolist() == ["one"]
    assert table["gain"].item() == pytest.approx(1.5)
    assert table["fresh_gain"].item() == pytest.approx(2)


def test_the_best_two_act_on_different_things_and_have_learned():
    rows = [
        ("a1", "units", 3.0, 1.0, False),
        ("a2", "units", 2.5, 1.0, False),
        ("slow", "start", 9.0, 0.5, False),
        ("control", "data", 8.0, 1.0, True),
        ("lora", "adapter", 7.0, 1.0, False),
        ("rate", "rate", 6.0, 1.0, False),
        ("b", "kept", 1.0, 0.95, False),
    ]
    columns = ["method", "mechanism", "gain", "learned", "is_control"]
    assert defended.best_two(pd.DataFrame(rows, columns=columns)) == ["a1", "b"]


# -------------------------------------------------------------------------------------------- cards


def gains(**changes) -> pd.DataFrame:
    """A method that meets everything, on both tasks."""
    row = {"method": "m", "title": "M", "is_control": False, "learned": 1.0}
    row |= {"gain": 2.0, "low": 1.0, "fresh_low": 0.5, "safe_gain": 1.0, "over_low": 0.2}
    second = {name[2:]: value for name, value in changes.items() if name.startswith("b_")}
    first = {name: value for name, value in changes.items() if not name.startswith("b_")}
    return pd.DataFrame([row | {"task": "a"} | first, row | {"task": "b"} | second])


def test_a_card_is_passed_by_who_meets_all_six():
    card = defended.cards(gains(), "a", "b").iloc[0]
    assert [card[name] for name in CRITERIA] == ["yes"] * 6
    assert (card["met"], card["verdict"]) == (6, "pass")


@pytest.mark.parametrize(
    ("change", "criterion"),
    [
        ({"learned": 0.89}, "learns"),
        ({"b_learned": 0.89}, "learns"),
        ({"low": -0.01}, "keeps"),
        ({"fresh_low": 0.0}, "fresh"),
        ({"over_low": -0.1}, "control"),
        ({"b_low": 0.0}, "second"),
        ({"safe_gain": 2.0}, "selective"),
    ],
)
def test_one_criterion_that_is_not_met_fails_the_card(change, criterion):
    card = defended.cards(gains(**change), "a", "b").iloc[0]
    assert [name for name in CRITERIA if card[name] == "no"] == [criterion]
    assert (card["met"], card["verdict"]) == (5, "fail")


def test_what_was_not_measured_is_neither_a_pass_nor_a_failure():
    card = defended.cards(gains()[:1], "a", "b").iloc[0]
    assert (card["second"], card["verdict"]) == ("not measured", "not measured")
    failing = defended.cards(gains(low=-1.0)[:1], "a", "b").iloc[0]
    assert failing["verdict"] == "fail"
    assert defended.cards(gains(over_low=np.nan), "a", "b")["control"].item() == "not measured"
    assert not len(defended.cards(gains().assign(is_control=True), "a", "b"))
