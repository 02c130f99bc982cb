"""Sets of units compared by what is lost when each is switched off, on requests never scored.

The refusal margin decides most comparisons: it moves smoothly, where counts of a few answers jump.
Answers are judged beside it, because a margin can fall by a mere change of wording. Knows language
models through their Hugging Face interface, and sets of units.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from torch import nn
from transformers import PreTrainedTokenizerBase

from ssah_utils import evaluation, interventions, stats
from ssah_utils.experiments import finders
from ssah_utils.judge.answers import AnswerLog
from ssah_utils.per_unit import PerUnit
from ssah_utils.prompts import chat

METRICS = ["margin_drop", "asr", "coherent_asr", "answer_nll"]
INTACT = "control: nothing"


@dataclass(frozen=True)
class AblationProbe:
    """The requests, and what is asked of the model under every ablation.

    * ``base``: the model under which an answer is improbable if it is gibberish; ``ValueError``
      where it is the very model that is ablated.
    * ``requests``: harmful ones (id, category, prompt); all have their margin taken.
    * ``n_judged``: so many of them, from the first on, are also answered and judged.
    * ``kept``: harmless requests (id, category, prompt) with the intact model's ``response``, whose
      probability is followed; or None.
    * ``means``: what switched-off units are held at; None for zero.
    * ``factor``: what their activations are multiplied by instead; ``ValueError`` beside ``means``.
    * ``n_openings``: openings of either side in the margin; None for all.
    * ``log``: where all judged answers are kept, under the name of the condition.
    """

    model: nn.Module
    base: nn.Module
    tokenizer: PreTrainedTokenizerBase
    requests: pd.DataFrame
    n_judged: int = 0
    new_tokens: int = 16
    system_prompt: str = ""
    kept: pd.DataFrame | None = None
    means: PerUnit | None = None
    n_openings: int | None = None
    factor: float = 0.0
    log: AnswerLog = field(default_factory=AnswerLog, compare=False)

    def __post_init__(self) -> None:
        if self.factor and self.means is not None:
            raise ValueError("units are held at means or multiplied by a factor, not both")
        if self.base is self.model:
            raise ValueError("the base is the model that is ablated: load it a second time")

    def switched(self, chosen: PerUnit) -> AbstractContextManager[nn.Module]:
        """The model while ``chosen`` is switched off, in the way of this probe."""
        if self.factor:
            return interventions.multiplied(self.model, chosen, self.factor)
        return interventions.ablated(self.model, chosen, self.means)

    def margins(self, chosen: PerUnit) -> np.ndarray:
        """Refusal margin of every request while ``chosen`` is switched off: (n_requests,) nats."""
        prompts = self.requests["prompt"].tolist()
        with self.switched(chosen):
            return evaluation.refusal_margin(
                self.model, self.tokenizer, prompts, self.system_prompt, self.n_openings
            )

    def answers(self, chosen: PerUnit, n: int | None = None, condition: str = "") -> pd.DataFrame:
        """Judged answers to the first ``n`` requests (None: all) while ``chosen`` is switched off,
        as ``evaluation.answer_and_judge`` gives them. ``condition`` names them in the log.
        """
        with self.switched(chosen):
            rows = evaluation.answer_and_judge(
                self.model,
                self.base,
                self.tokenizer,
                self.requests[:n],
                self.new_tokens,
                self.system_prompt,
            )
        return self.log.add(rows, condition=condition, units=chosen.count(), factor=self.factor)

    def measure(self, chosen: PerUnit, condition: str = "") -> pd.DataFrame:
        """One row a request: set, id, category, margin, asr, coherent_asr, answer_nll; a value that
        was not asked for is missing. ``condition`` names the answers in the log.
        """
        table = self.requests[["id", "category"]].reset_index(drop=True).assign(set="harmful")
        table["margin"] = self.margins(chosen)
        if self.n_judged:
            judged = self.answers(chosen, self.n_judged, condition).reset_index(drop=True)
            table = table.join(judged[["asr", "coherent_asr"]])
        if self.kept is None:
            return table
        rendered = chat.render(self.tokenizer, self.kept["prompt"].tolist(), self.system_prompt)
        likely = self.kept[["id", "category"]].assign(set="helpful")
        with self.switched(chosen):
            likely["answer_nll"] = evaluation.response_nll(
                self.model, self.tokenizer, rendered, self.kept["response"].tolist()
            )
        return pd.concat([table, likely], ignore_index=True)

    def compare(
        self, sets: Mapping[str, PerUnit], progress: evaluation.Progress = evaluation._silent
    ) -> pd.DataFrame:
        """``measure`` under every set, and first under none (``INTACT``): also variant, family and
        margin_drop, the margin lost against the intact model.
        """
        nothing = next(iter(sets.values())).empty_set()
        intact, found = None, []
        for name, chosen in progress(list({INTACT: nothing, **sets}.items()), "ablating sets"):
            rows = self.measure(chosen, name)
            intact = rows["margin"] if intact is None else intact
            rows = rows.assign(variant=name, family=finders.family(name))
            found.append(rows.assign(margin_drop=intact - rows["margin"]))
        return pd.concat(found, ignore_index=True)


# ----------------------------------------------------------------------------- requests and tables


def in_turns(requests: pd.DataFrame, n_per_category: int) -> pd.DataFrame:
    """At most so many requests of every category, the categories taking turns, so that any first
    few of them are balanced.
    """
    turn = requests.groupby("category").cumcount()
    order = turn[turn < n_per_category].sort_values(kind="stable").index
    return requests.loc[order].reset_index(drop=True)


def rates(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean and 95% interval of every metric under every set: variant, family, metric, mean, low,
    high, n.
    """
    there = [metric for metric in METRICS if metric in rows]
    return stats.rate_table(rows, ["variant", "family"], there)


def mean_over(rows: pd.DataFrame, variants: Sequence[str], metric: str) -> pd.Series:
    """A metric of every harmful request, averaged over several variants (random draws), by id;
    requests without a value are left out.
    """
    asked = rows[(rows["set"] == "harmful") & rows["variant"].isin(variants)]
    values = asked.assign(value=asked[metric].astype(float)).dropna(subset="value")
    return values.groupby("id", sort=False)["value"].mean()


def margin_losses(rows: pd.DataFrame, random: Sequence[str]) -> pd.DataFrame:
    """Margin lost under every set but the controls: variant, family, margin_drop, low, high,
    share_of_reference, above_random.

    ``share_of_reference`` is of what ``finders.REFERENCE`` loses. ``above_random``: whether the
    interval lies above that of the random sets named in ``random``, taken together.
    """
    random_high = stats.mean_interval(mean_over(rows, random, "margin_drop").to_numpy())[2]
    table = rates(rows[rows["family"] != "control"]).query("metric == 'margin_drop'")
    table = table.rename(columns={"mean": "margin_drop"}).reset_index(drop=True)
    whole = table.set_index("variant")["margin_drop"][finders.REFERENCE]
    table["share_of_reference"] = table["margin_drop"] / whole
    table["above_random"] = table["low"] > random_high
    return table.drop(columns=["metric", "n"])


def category_table(rows: pd.DataFrame, sources: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """What sets found on one category take on every category.

    ``sources``: by name, the variants that are averaged. Columns: found_on, measured_on,
    margin_drop, low, high, coherent_asr, n, n_judged, share_of_reference (of what the source named
    ``finders.REFERENCE`` takes there).
    """
    category_of = rows[rows["set"] == "harmful"].groupby("id", sort=False)["category"].first()
    found = []
    for source, variants in sources.items():
        drop = mean_over(rows, variants, "margin_drop")
        coherent = mean_over(rows, variants, "coherent_asr")
        for category in sorted(set(category_of)):
            mean, low, high = stats.mean_interval(drop[category_of[drop.index] == category])
            answered = coherent[category_of[coherent.index] == category]
            row = {"found_on": source, "measured_on": category, "margin_drop": mean}
            row |= {"low": low, "high": high, "coherent_asr": answered.mean()}
            found.append(row | {"n": (category_of == category).sum(), "n_judged": len(answered)})
    table = pd.DataFrame(found)
    whole = table[table["found_on"] == finders.REFERENCE].set_index("measured_on")["margin_drop"]
    table["share_of_reference"] = table["margin_drop"] / table["measured_on"].map(whole)
    return table
