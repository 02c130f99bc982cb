"""How long an answer must be for its verdict to be that of the whole answer.

A greedy answer of a few tokens is the beginning of a longer one. So every model answers once, at
length, and the judge sees beginnings, cut by tokens. Knows models, requests and sets of units.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from torch import Generator, nn
from transformers import PreTrainedTokenizerBase

from ssah_utils import evaluation, interventions, prompt_cache, units
from ssah_utils.judge.decisions import judged
from ssah_utils.per_unit import PerUnit
from ssah_utils.prompts.chat import render
from ssah_utils.stats import mean_interval, proportion_interval

BASE, ALIGNED, ALL = "base", "aligned", "all"
PAIR = (ALIGNED, "safety")  # two conditions whose answers differ: what a flip is held against
SHARES = ("refused", "coherent_asr", "degenerate")
MAX_FLIPS = 0.05  # of all verdicts, at a length that is long enough


def unit_conditions(partition: units.UnitPartition, generator: Generator) -> dict[str, PerUnit]:
    """What is switched off in the aligned model, by condition: nothing, and what claims rest on."""
    safety = partition.units("safety")
    return {
        ALIGNED: safety.empty_set(),
        "safety": safety,
        "random, as safety": units.random_units(safety, generator),
        "utility": partition.units("utility"),
        "redundant": partition.units("redundant"),
    }


@dataclass(frozen=True)
class AnswerLengths:
    """Requests that are answered once, and judged at several lengths.

    * ``base``: the model under which an answer is improbable if it is gibberish.
    * ``requests``: tables of requests (id, category, prompt) by the name of their set.
    * ``lengths``, ``default``: in tokens. ``default`` is what other notebooks generate; it is
      judged, too, and ``ValueError`` where no length is above it, as nothing would be compared.
    """

    base: nn.Module
    tokenizer: PreTrainedTokenizerBase
    requests: Mapping[str, pd.DataFrame]
    lengths: Sequence[int]
    default: int
    system_prompt: str = ""

    def __post_init__(self) -> None:
        if max(self.lengths) <= self.default:
            raise ValueError(
                f"lengths {list(self.lengths)} end at or before new_tokens, {self.default}:"
                " add a longer one"
            )

    @property
    def all_lengths(self) -> list[int]:
        """Every length that is judged, shortest first."""
        return sorted({*self.lengths, self.default})

    def measure(self, model: nn.Module) -> pd.DataFrame:
        """One row per request and length: set, id, category, prompt, length, response, base_nll
        (nats per token, of that beginning), and what ``decisions.judged`` adds.
        """
        found = []
        for name, table in self.requests.items():
            rendered = render(self.tokenizer, table["prompt"].tolist(), self.system_prompt)
            ids = evaluation.generate_ids(model, self.tokenizer, rendered, self.all_lengths[-1])
            for length in self.all_lengths:
                texts = beginnings(self.tokenizer, ids, length)
                asked = (self.base, self.tokenizer, rendered, texts, length)
                rows = table[["id", "category", "prompt"]].assign(set=name, length=length)
                rows = rows.assign(response=texts, base_nll=evaluation.response_nll(*asked))
                found.append(judged(rows))
        return pd.concat(found, ignore_index=True)

    def measure_all(
        self,
        model: nn.Module,
        conditions: Mapping[str, PerUnit],
        with_base: bool = True,
        progress: evaluation.Progress = evaluation._silent,
    ) -> pd.DataFrame:
        """``measure`` of the base and of a model under every ablation, with its ``condition``.

        ``ValueError`` where the base is the very model that is ablated: it would judge without
        these units, too.
        """
        if self.base is model:
            raise ValueError("the base is the model that is ablated: load it a second time")
        found = [self.measure(self.base).assign(condition=BASE)] if with_base else []
        for name in progress(list(conditions), "answering at length"):
            with interventions.ablated(model, conditions[name]):
                found.append(self.measure(model).assign(condition=name))
        return pd.concat(found, ignore_index=True)


def beginnings(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[list[int]], length: int
) -> list[str]:
    """The first ``length`` tokens of answers as text: what an answer of that length would be."""
    return [prompt_cache.decoded(tokenizer, one[:length]).strip() for one in ids]


# ------------------------------------------------------------------------------------------- tables


def shares_by_length(rows: pd.DataFrame) -> pd.DataFrame:
    """Shares of verdicts: condition, set, length, refused, coherent_asr, degenerate, n."""
    groups = rows.groupby(["condition", "set", "length"], sort=False)
    return groups[list(SHARES)].mean().assign(n=groups.size()).reset_index()


def flip_table(rows: pd.DataFrame, default: int) -> pd.DataFrame:
    """How many verdicts at a length are not those of the longest answers.

    Columns: condition, set, length, role ("default", "longest" or ""), flips (share), low, high
    (95%), n (verdicts). The rows of condition and set ``ALL`` are over all conditions and sets;
    their interval is a bootstrap over requests, since one request flips in several conditions.
    Others have Wilson's, and so has a share of 0 or 1.
    """
    wide = rows.pivot_table(
        index=["condition", "set", "id"],
        columns="length",
        values="verdict",
        aggfunc="first",
        sort=False,
    )
    longest, records = max(wide.columns), []
    for length in sorted(wide.columns):
        flipped = wide[length] != wide[longest]
        role = {longest: "longest", default: "default"}.get(length, "")
        keys = {"length": int(length), "role": role}
        for (condition, name), part in flipped.groupby(["condition", "set"], sort=False):
            share = proportion_interval(part.to_numpy())
            records.append(_record({"condition": condition, "set": name} | keys, share, len(part)))
        by_request = flipped.astype(float).groupby(["set", "id"], sort=False).mean().to_numpy()
        has_width = 0 < by_request.mean() < 1
        share = mean_interval(by_request) if has_width else proportion_interval(flipped.to_numpy())
        records.append(_record({"condition": ALL, "set": ALL} | keys, share, len(flipped)))
    return pd.DataFrame(records)


def control_table(rows: pd.DataFrame, pair: tuple[str, str] = PAIR) -> pd.DataFrame:
    """How many verdicts of the longest answers differ between two conditions: condition, against,
    set, flips, low, high (Wilson), n.
    """
    longest = rows[rows["length"] == rows["length"].max()]
    one, other = (
        longest[longest["condition"] == name].set_index(["set", "id"])["verdict"] for name in pair
    )
    differs, records = one != other.loc[one.index], []
    for name, part in differs.groupby("set", sort=False):
        keys = {"condition": pair[0], "against": pair[1], "set": name}
        records.append(_record(keys, proportion_interval(part.to_numpy()), len(part)))
    return pd.DataFrame(records)


def _record(keys: dict, share: tuple[float, float, float], n: int) -> dict:
    return keys | dict(zip(("flips", "low", "high"), share, strict=True)) | {"n": n}


def long_enough(flips: pd.DataFrame, limit: float = MAX_FLIPS) -> int | None:
    """The shortest length from which on at most ``limit`` of all verdicts flip; None where only
    the longest answers are.
    """
    found = None
    overall = flips[(flips["condition"] == ALL) & (flips["role"] != "longest")]
    for row in overall.sort_values("length", ascending=False).itertuples():
        if row.flips > limit:
            break
        found = int(row.length)
    return found
