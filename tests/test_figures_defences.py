"""Figures of A4_defences: every method is drawn, controls hollow, in its mechanism's colour."""

import pandas as pd
import pytest
from matplotlib.colors import same_color

from ssah_utils.experiments import defence_names, defended
from ssah_utils.figures import defences

pytestmark = pytest.mark.usefixtures("drawn_in_our_style")
METHODS = {  # id: mechanism, whether it is only a control, gain
    "nothing": ("none", False, 0.0),
    "safety_some_complex": ("units", False, 0.5),
    "random_as_safety_some_complex": ("units", True, 0.1),
    "mixed_3": ("data", False, 1.5),
    "combination": ("both", False, 1.7),
}


def defence_tables() -> dict[str, pd.DataFrame]:
    """As A4_defences stores them."""
    paths, gains, cards = [], [], []
    for name, (mechanism, is_control, gain) in METHODS.items():
        about = {"method": name, "title": f"title of {name}", "mechanism": mechanism}
        about |= {"is_control": is_control}
        for task in ("adaptation", "arithmetic"):
            if task == "arithmetic" and is_control:
                continue
            for step, loss in ((0, 6.0), (15, 4.0)):
                margin = 7 - step / 3 + gain * step / 15
                measured = {"step": step, "task_loss": loss, "margin": margin}
                paths.append(about | {"task": task} | measured)
            row = about | {"task": task, "learned": 1.0, "gain": gain, "fresh_gain": gain / 2}
            row |= {"low": gain - 0.1, "high": gain + 0.1, "safe_gain": 0.05}
            row |= {"fresh_low": gain / 2 - 0.2, "fresh_high": gain / 2 + 0.2}
            gains += [row] if name != "nothing" else []
        if name != "nothing" and not is_control:
            said = dict.fromkeys(defended.CRITERIA, "yes")
            said |= {"control": "no"} if mechanism == "data" else {"second": "not measured"}
            verdict = "fail" if mechanism == "data" else "not measured"
            card = {"method": name, "title": about["title"], **said, "met": 5, "verdict": verdict}
            cards.append(card)
    rate = {"task": "adaptation", "metric": "coherent_asr", "mean": 0.25}
    rates = [
        rate | {"method": name, "set": source}
        for name in ("nothing", "mixed_3")
        for source in ("harmful", "other_harmful")
    ]
    tables = {"paths": paths, "gains": gains, "cards": cards, "rates": rates}
    return {name: pd.DataFrame(rows) for name, rows in tables.items()}


def test_every_mechanism_has_a_colour_of_its_own_and_a_name():
    named = {mechanism for _, mechanism, _ in defence_names.NAMED.values()}
    mechanisms = named | {defence_names.MIXED}
    assert mechanisms | {"both"} == set(defences.MECHANISM_COLOURS) == set(defences.MECHANISM_NAMES)


def test_paths_go_through_loss_and_margin_and_controls_are_dashed():
    figure = defences.defence_frontier(defence_tables())
    assert [ax.get_title("left") for ax in figure.axes] == ["adaptation", "arithmetic"]
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 2]
    drawn = {line.get_color(): line for line in lines[:-1]}
    assert len(lines) - 1 == len(METHODS), "the last is the line at zero"
    units = [line for line in lines if same_color(line.get_color(), "#D55E00")]
    assert [line.get_linestyle() for line in units] == ["-", "--"]
    assert list(units[0].get_ydata()) == pytest.approx([7, 2.5]) and drawn
    assert figure.axes[0].xaxis_inverted()


def test_gains_stand_at_their_numbers_the_largest_on_top():
    figure = defences.defence_gains(defence_tables())
    ax = figure.axes[0]
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names[0] == "title of combination" and len(names) == 4
    dots = [line for line in ax.lines if line.get_marker() in ("o", "s")]
    assert len(dots) == 2 * len(names)
    first = [float(line.get_xdata()[0]) for line in dots[:2]]
    assert first == pytest.approx([1.7, 0.85])
    hollow = [line for line in dots if line.get_markerfacecolor() == "none"]
    assert len(hollow) == 2, "the control, on both kinds of requests"
    assert len(figure.axes[1].lines) == 2 * 3 + 1, "no control was run on the second task"


def test_cards_show_what_is_met_and_what_is_not():
    tables = defence_tables()
    figure = defences.defence_cards(tables)
    ax = figure.axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == list(defended.CRITERIA)
    marks = [line.get_marker() for line in ax.lines]
    assert (marks.count("x"), marks.count("_"), marks.count("o")) == (1, 2, 15)
    assert [text.get_text() for text in ax.texts] == tables["cards"]["verdict"].tolist()
