"""The figure of one unit on a few requests: every request has its line, with its variance."""

import pandas as pd
import pytest

from ssah_utils.figures import units as unit_figures
from ssah_utils.figures.style import GROUP_COLOURS

pytestmark = pytest.mark.usefixtures("drawn_in_our_style")


def test_every_request_has_a_line_in_the_colour_of_its_set_and_its_variance():
    values = pd.DataFrame(
        {
            "request": ["bad"] * 3 + ["good"] * 2,
            "set": ["harmful"] * 3 + ["helpful"] * 2,
            "position": [0, 1, 2, 0, 1],
            "value": [1.0, 2.0, 6.0, 0.5, 0.5],
        }
    )
    (ax,) = unit_figures.one_unit(values, "mlp/3/17").axes
    bad, good = ax.lines[:2]
    assert list(bad.get_ydata()) == [1, 2, 6] and bad.get_color() == GROUP_COLOURS["safety"]
    assert list(good.get_xdata()) == [0, 1] and good.get_color() == GROUP_COLOURS["utility"]
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["bad (variance 7)", "good (variance 0)"]
    assert "mlp/3/17" in ax.get_title(loc="left") + ax.get_title()
