"""A small panel in a notebook: choose a request and how much is switched off, and look.

Knows widgets, tables and pictures. What is looked at, and how it is drawn, are functions that it is
given: no model and no style is known here.
"""

import html
import io
from collections.abc import Callable, Sequence

import pandas as pd

from ssah_utils import extras

with extras.needed("notebooks"):
    import ipywidgets
    from matplotlib.figure import Figure

Look = Callable[[int, float], pd.DataFrame]
Draw = Callable[[pd.DataFrame, float], Figure]


class Explorer:
    """A choice of request, a slider of shares, and below them a picture and words.

    * ``requests``: what can be chosen, as shown.
    * ``shares``: stops of the slider, in order.
    * ``look``: of a request's number and a share, one row for everything that is compared there:
      ``switched_off``, ``verdict``, ``response`` (as it may be shown) and ``margin``, in nats.
      Asked once for each choice.
    * ``draw``: of all rows that were looked at for the request, and the share, a picture.
    """

    def __init__(
        self, requests: Sequence[str], shares: Sequence[float], look: Look, draw: Draw
    ) -> None:
        self.look, self.draw = look, draw
        self.seen: dict[tuple[int, float], pd.DataFrame] = {}
        wide = ipywidgets.Layout(width="100%")
        self.request = ipywidgets.Dropdown(
            options=[(text, number) for number, text in enumerate(requests)],
            description="Request",
            layout=wide,
        )
        self.share = ipywidgets.SelectionSlider(
            options=[(f"{share:.1%}", share) for share in shares],
            description="Off",
            continuous_update=False,  # each stop takes seconds
            layout=ipywidgets.Layout(width="60%"),
        )
        self.busy = ipywidgets.Label()
        self.picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(width="640px"))
        self.words = ipywidgets.HTML()
        for control in (self.request, self.share):
            control.observe(self._changed, names="value")
        row = ipywidgets.HBox([self.share, self.busy])
        self.panel = ipywidgets.VBox([self.request, row, self.picture, self.words])
        self.update()

    def _changed(self, change: dict) -> None:
        self.update()

    def update(self) -> None:
        """Look where it has not been looked yet, then show."""
        number, share = self.request.value, self.share.value
        if (number, share) not in self.seen:
            self.busy.value = "asking the model ..."
            try:
                self.seen[number, share] = self.look(number, share)
            finally:
                self.busy.value = ""
        of_request = {at: rows for (one, at), rows in self.seen.items() if one == number}
        everything = pd.concat([of_request[at] for at in sorted(of_request)], ignore_index=True)
        self.picture.value = png_of(self.draw(everything, share))
        self.words.value = words_of(self.seen[number, share])

    def _repr_mimebundle_(self, **how: object) -> dict:
        return self.panel._repr_mimebundle_(**how)


def png_of(figure: Figure) -> bytes:
    """A figure as the bytes of a picture; pyplot lets go of it."""
    import matplotlib.pyplot as plt

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    plt.close(figure)
    return file.getvalue()


def words_of(rows: pd.DataFrame) -> str:
    """One line of HTML for each row: what is off, the verdict, the first words, the margin."""
    lines = []
    for row in rows.itertuples():
        off, said = html.escape(row.switched_off), html.escape(row.response)
        lines.append(
            f"<b>{off}</b> off: {row.verdict}, margin {row.margin:+.1f} nats: <i>{said}</i>"
        )
    return "<br>".join(lines)
