"""Compare fine-tunings at equal task loss: what one kept of its safety when it had learned as much.

A model that learns less also forgets less. So a margin after so many steps says nothing about a
way to train; the margin at a loss that every compared run reaches does. Pure numbers: no model, no
prompt. Losses and margins are in nats.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ssah_utils import frozen_sets, stats


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
    condition, task_loss (the common one), margin, gain with its interval low to high and p (over
    seeds and requests, ``stats.paired_difference``), seed_low and seed_high (the range of the
    seeds' gains). ``ValueError`` where conditions cannot be paired.
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


def equal_loss_table(
    paths: Mapping[tuple[str, str, int], LossPath],
    compared: Sequence[tuple[str, Sequence[str]]],
    against: str,
    seed: int = 0,
) -> pd.DataFrame:
    """``at_equal_loss`` of several comparisons in one table, p-values corrected over it (Holm).

    * ``paths``: one run by (task, condition, seed).
    * ``compared``: task and conditions of every comparison, each of which has a common loss of its
      own. Conditions that were not run on a task are left out. ``against`` is always in, and has a
      row in the first comparison of each task.

    Columns: task, those of ``at_equal_loss``, p_holm.
    """
    parts, tasks = [], set()
    for task, names in compared:
        of_condition: dict[str, list[LossPath]] = {}
        for name in (against, *names):
            found = [path for key, path in paths.items() if key[:2] == (task, name)]
            of_condition |= {name: found} if found else {}
        table = at_equal_loss(of_condition, against, seed)
        table.insert(0, "task", task)
        parts.append(table[1:] if task in tasks else table)
        tasks.add(task)
    equal = pd.concat(parts, ignore_index=True)
    return equal.assign(p_holm=stats.holm(equal["p"].tolist()))


def pairwise(
    paths: Mapping[str, LossPath], references: Mapping[str, LossPath], seed: int = 0
) -> pd.DataFrame:
    """Every run against every reference, each pair at the loss that both reach.

    Columns: method, against, last_loss (of the method), task_loss (the common one), gain, low,
    high.
    """
    rows = []
    for name, path in paths.items():
        for other, reference in references.items():
            table = at_equal_loss({"method": [path], "against": [reference]}, "against", seed)
            found = table.iloc[0][["task_loss", "gain", "low", "high"]].to_dict()
            rows.append({"method": name, "against": other, "last_loss": path.losses[-1]} | found)
    return pd.DataFrame(rows)


def outcome_table(equal: pd.DataFrame, paths: pd.DataFrame, rates: pd.DataFrame) -> pd.DataFrame:
    """What came of each frozen set on one task, beside its random control: a row per set.

    * ``equal``: condition, title, gain, low, high, at equal task loss.
    * ``paths``: condition, step, task_loss. ``rates``: condition, set, metric, mean.

    Columns: condition, title, gain, low, high, control (the gain of the random set), asr_* (by set
    of requests, at the end, mean over seeds), loss_ratio (last task loss over that of freezing
    nothing). Safety units alone have no random set of their size and stand beside the smallest.
    """
    gained = equal.set_index("condition")
    last_loss = paths[paths["step"] == paths["step"].max()].groupby("condition")["task_loss"].mean()
    answered = rates[rates["metric"] == "asr"]
    asr = answered.groupby(["condition", "set"])["mean"].mean()
    rows = []
    for name in ("safety", "safety_some_complex", "safety_all_complex"):
        like = "safety_some_complex" if name == "safety" else name
        row = {"condition": name} | gained.loc[name, ["title", "gain", "low", "high"]].to_dict()
        row["control"] = gained.loc[frozen_sets.RANDOM + like, "gain"]
        row |= {f"asr_{source}": asr[name, source] for source in answered["set"].unique()}
        rows.append(row | {"loss_ratio": last_loss[name] / last_loss["nothing"]})
    return pd.DataFrame(rows)
