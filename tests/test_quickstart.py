"""The first notebook: what is switched off is what it says, and its panel shows what was asked."""

from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from ssah_utils import embedded, evaluation, explorer, interventions, loading, models
from ssah_utils.experiments.ablation_probe import AblationProbe
from ssah_utils.experiments.safety_switch import NOTHING, RANDOM, SAFETY, SafetySwitch
from ssah_utils.figures import quickstart

SHARES = [0.0, 0.05, 0.2]


@pytest.fixture(scope="module")
def switch() -> SafetySwitch:
    model, tokenizer = loading.load(embedded.TINY_RANDOM)
    base, _ = loading.load(embedded.TINY_RANDOM)
    shape = models.shape_of(model)
    generator = torch.Generator().manual_seed(0)
    contrast = {
        kind: torch.randn(shape.n_layers, shape.n_channels(kind), generator=generator)
        for kind in ("attention", "mlp")
    }
    prompts = [f"request {number}: how is it done?" for number in range(3)]
    table = pd.DataFrame({"id": prompts, "category": "", "prompt": prompts})
    ranked = models.check_per_unit(model, contrast)
    return SafetySwitch(AblationProbe(model, base, tokenizer, table, new_tokens=3), ranked)


def test_the_control_has_as_many_units_in_every_module(switch):
    sets = switch.sets(0.05)
    for kind in sets[SAFETY]:
        assert torch.equal(sets[SAFETY][kind].sum(1), sets[RANDOM][kind].sum(1))
    assert not torch.equal(sets[SAFETY].flatten(), sets[RANDOM].flatten())
    assert sets[SAFETY].count() == round(0.05 * switch.contrast.n_units)


def test_a_larger_share_switches_off_what_a_smaller_one_does(switch):
    small, large = (switch.sets(share)[SAFETY] for share in (0.05, 0.2))
    assert (small & large).equals(small)


def test_nothing_is_off_at_a_share_of_zero(switch):
    looks = switch.look(0.0)
    assert set(looks["switched_off"]) == {NOTHING} and set(looks["units"]) == {0}
    prompts = switch.probe.requests["prompt"].tolist()
    intact = evaluation.refusal_margin(switch.probe.model, switch.probe.tokenizer, prompts)
    assert looks["margin"].tolist() == pytest.approx(intact.tolist())


def test_a_look_is_that_of_a_model_without_the_units(switch):
    looks = switch.look(0.2, [2, 0]).set_index(["switched_off", "prompt"])
    prompts = switch.probe.requests["prompt"].iloc[[2, 0]].tolist()
    for name, chosen in switch.sets(0.2).items():
        small = interventions.without_units(switch.probe.model, chosen)
        expected = evaluation.refusal_margin(small, switch.probe.tokenizer, prompts)
        found = looks.loc[name].loc[prompts, "margin"]
        assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-3)


def test_a_base_that_would_be_ablated_along_is_refused(switch):
    with pytest.raises(ValueError, match="load it a second time"):
        SafetySwitch(replace(switch.probe, base=switch.probe.model), switch.contrast)


# ------------------------------------------------------------------------------------- the explorer


class Asked:
    """Answers a look with numbers that tell request and share, and counts how often it is asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, float]] = []

    def __call__(self, number: int, share: float) -> pd.DataFrame:
        self.calls.append((number, share))
        names = [NOTHING] if share == 0 else [SAFETY, RANDOM]
        margins = [10.0 * number + 100 * share - position for position in range(len(names))]
        columns = {"switched_off": names, "share": share, "margin": margins}
        said = {"response": "<b>I can</b> [...]", "verdict": "refused"}
        return pd.DataFrame(columns | said)


@pytest.fixture
def panel():
    asked = Asked()
    return explorer.Explorer(["first", "second"], SHARES, asked, quickstart.explored), asked


def test_the_panel_shows_the_first_choice_at_once(panel):
    shown, asked = panel
    assert asked.calls == [(0, 0.0)]
    assert bytes(shown.picture.value).startswith(b"\x89PNG") and "nothing" in shown.words.value


def test_moving_the_slider_changes_picture_and_words(panel):
    shown, asked = panel
    before = bytes(shown.picture.value)
    shown.share.value = 0.2
    assert asked.calls[-1] == (0, 0.2)
    assert bytes(shown.picture.value) != before
    assert "margin +20.0 nats" in shown.words.value and "margin +19.0 nats" in shown.words.value


def test_a_choice_is_asked_for_once(panel):
    shown, asked = panel
    for number, share in ((0, 0.2), (1, 0.2), (0, 0.2), (0, 0.0), (1, 0.2)):
        shown.request.value, shown.share.value = number, share
    assert len(asked.calls) == len(set(asked.calls))


def test_what_a_model_says_cannot_become_markup(panel):
    shown, _ = panel
    assert "<b>I can</b>" not in shown.words.value and "&lt;b&gt;I can" in shown.words.value


def test_a_look_that_fails_is_not_remembered_and_leaves_no_busy_sign():
    def broken(number: int, share: float) -> pd.DataFrame:
        if share:
            raise RuntimeError("out of memory")
        return Asked()(number, share)

    shown = explorer.Explorer(["first"], SHARES, broken, quickstart.explored)
    with pytest.raises(RuntimeError, match="out of memory"):
        shown.share.value = 0.2
    assert shown.busy.value == "" and list(shown.seen) == [(0, 0.0)]


def test_no_figure_stays_open(panel):
    shown, _ = panel
    shown.share.value = 0.05
    assert not plt.get_fignums()


@pytest.mark.parametrize("verdicts", [["refused"] * 2, ["complied", "degenerate"]])
def test_figures_are_drawn_for_any_verdicts(verdicts):
    rows = []
    for name in (NOTHING, SAFETY, RANDOM):
        for number, verdict in enumerate(verdicts):
            rows.append((name, 0.0 if name == NOTHING else 0.013, verdict, 5.0 - number))
    looks = pd.DataFrame(rows, columns=["switched_off", "share", "verdict", "margin"])
    for figure in (quickstart.safety_switch({"looks": looks}), quickstart.explored(looks, 0.013)):
        assert figure.axes
        plt.close(figure)
