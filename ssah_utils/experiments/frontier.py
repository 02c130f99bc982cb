"""Compare fine-tunings at equal task loss: what one kept of its safety when it had learned as much.

A model that learns less also forgets less. So a margin after so many steps says nothing about a
way to train; the margin at a loss that every compared run reaches does. Pure numbers: no model, no
prompt. Losses and margins are in nats.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ssah_utils import stats


@dataclass(frozen=True)
class LossPath:
    """One fine-tuning at its checkpoints, the first of which is before training.

    * ``losses``: (n_checkpoints,) task loss on held-out pairs.
    * ``margins``: (n_checkpoints, n_requests) refusal margin of every request.
    """

    losses: np.ndarray
    margins: np.ndarray

    def __post_init__(self) -> None:
        losses, margins = (np.asarray(one, dtype=float) for one in (self.losses, self.margins))
        if losses.ndim != 1 or len(losses) < 2 or margins.shape[:1] != losses.shape:
            raise ValueError(
                f"losses of shape {losses.shape} and margins of shape {margins.shape}: both need"
                " one entry per checkpoint, the first before training"
            )
        object.__setattr__(self, "losses", losses)
        object.__setattr__(self, "margins", margins)

    @property
    def lowest_loss(self) -> float:
        """The smallest loss that training reached."""
        return float(self.losses[1:].min())

    def margins_at(self, loss: float) -> np.ndarray:
        """Margin of every request where the loss first falls to ``loss``: (n_requests,).

        Linear between checkpoints. Before training, where the loss is no higher from the start;
        at the last checkpoint, where it is never reached.
        """
        if self.losses[0] <= loss:
            return self.margins[0]
        reached = np.flatnonzero(self.losses <= loss)
        if not len(reached):
            return self.margins[-1]
        after = reached[0]
        above, below = self.losses[after - 1], self.losses[after]
        share = (above - loss) / (above - below)
        return (1 - share) * self.margins[after - 1] + share * self.margins[after]


def common_loss(paths: Mapping[Hashable, Sequence[LossPath]]) -> float:
    """The lowest loss that every run reaches: the largest of the runs' smallest losses."""
    return max(path.lowest_loss for of_condition in paths.values() for path in of_condition)


def at_equal_loss(
    paths: Mapping[Hashable, Sequence[LossPath]], against: Hashable, seed: int = 0
) -> pd.DataFrame:
    """One row per condition: its margin at the common loss, and the gain over condition
    ``against``.

    ``paths``: by condition, one run per seed, the same seeds and requests in each. Columns:
    condition, task_loss (the common one), margin, gain with its interval low to high (seeds and
    requests both drawn anew), p (sign flips of the requests' means over seeds), seed_low and
    seed_high (the range of the seeds' gains). ``ValueError`` where conditions cannot be paired.
    """
    if against not in paths:
        raise ValueError(
            f"no runs of '{against}' to compare with (there: {', '.join(map(str, paths))})"
        )
    loss = common_loss(paths)
    margins = {}
    for name, of_condition in paths.items():
        margins[name] = np.array([path.margins_at(loss) for path in of_condition])
    reference = margins[against]  # (n_seeds, n_requests)
    rows = []
    for name, values in margins.items():
        if values.shape != reference.shape:
            raise ValueError(
                f"'{name}' has {values.shape} seeds and requests, '{against}' {reference.shape}:"
                " only the same ones can be paired"
            )
        by_seed = (values - reference).mean(1)
        test = stats.paired_difference(values, reference, seed)
        rows.append(
            {
                "condition": name,
                "task_loss": loss,
                "margin": values.mean(),
                "gain": test["difference"],
                "low": test["low"],
                "high": test["high"],
                "p": test["p"],
                "seed_low": by_seed.min(),
                "seed_high": by_seed.max(),
            }
        )
    return pd.DataFrame(rows)
